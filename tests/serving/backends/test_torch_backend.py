"""PyTorch as a backend, against the module in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from service.errors import BackendFailed
from service.graph import Program, trace
from service.serving import Precision, Prepared
from service.serving.backends.rows import padded_size, powers_of_two, warm_up
from service.serving.backends.torch_backend import TorchBackend
from tests.serving import pair

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLACES = ["cpu", pytest.param("cuda", marks=[gpu, pytest.mark.gpu])]


class Twice(nn.Module):
    """Two outputs, one of them integer, so that shapes and types are not taken for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.linear(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits, logits.argmax(1)


class Similarity(nn.Module):
    """Every row's product with every other: what a row gets depends on the batch it is in."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ x.t()


class Total(nn.Module):
    """One number for the whole batch: not servable in batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    module = Twice().eval()
    with torch.no_grad():
        module.norm.running_mean.uniform_(-1, 1)
        module.norm.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture(scope="module")
def program(module: nn.Module) -> Program:
    return trace(module, (torch.zeros(1, 3, 10, 10),))


def _prepare(program: Program, place: str, precision: Precision = "float32") -> Prepared:
    prepared = TorchBackend().prepare(program, place, precision, (4, 1, 2))
    list(prepared.warm())
    return prepared


def _truth(module: nn.Module, batch: Tensor) -> Tensor:
    double = Twice().double().eval()
    double.load_state_dict(module.state_dict())
    with torch.no_grad():
        logits: Tensor = double(batch.double())[0]
    return logits


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_every_number_of_rows_gives_the_modules_outputs(
    module: nn.Module, program: Program, place: str, precision: Precision, tolerance: float
) -> None:
    prepared = _prepare(program, place, precision)
    for size in (1, 2, 3, 4):
        batch = torch.randn(size, 3, 10, 10, generator=torch.Generator().manual_seed(size))
        logits, label = prepared.run((batch,))
        truth = _truth(module, batch)
        assert logits.dtype == torch.float32
        assert label.dtype == torch.int64
        assert logits.shape == (size, 5)
        assert label.shape == (size,)
        error = (logits.double() - truth).norm() / truth.norm()
        assert error < tolerance
        if precision == "bfloat16":
            assert error > 1e-5  # or it was not computed in bfloat16 at all


@pytest.mark.parametrize("place", PLACES)
def test_a_later_run_does_not_overwrite_an_earlier_answer(program: Program, place: str) -> None:
    prepared = _prepare(program, place)
    first = prepared.run((torch.ones(2, 3, 10, 10),))[0]
    kept = first.clone()
    prepared.run((torch.full((2, 3, 10, 10), -3.0),))
    assert torch.equal(first, kept)


@gpu
@pytest.mark.gpu
def test_padding_rows_and_graphs_do_not_change_an_answer(program: Program) -> None:
    prepared = _prepare(program, "cuda")
    batch = torch.randn(3, 3, 10, 10)
    together = prepared.run((batch,))[0]
    alone = torch.cat([prepared.run((row[None],))[0] for row in batch])
    assert not any("eagerly" in note for note in prepared.describe().notes)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_the_description_says_what_runs_where(program: Program) -> None:
    data = _prepare(program, "cpu").describe().to_dict()
    assert data["backend"] == "torch"
    assert data["backend_version"] == str(torch.__version__)
    assert data["place"] == "cpu"
    assert data["device"]
    assert data["precision"] == "float32"
    assert data["threads"] in (1, torch.get_num_threads())
    assert data["layout"] in ("contiguous_format", "channels_last", "prepacked")
    assert data["batch_sizes"] == [1, 2, 4]
    assert data["weight_bytes"] == program.weight_bytes
    assert any("channels_last took" in note for note in data["notes"])
    half = _prepare(program, "cpu", "bfloat16").describe()
    assert half.weight_bytes == program.weight_bytes // 2


def test_preparing_leaves_the_program_as_it_was(program: Program) -> None:
    before = {name: (t.clone(), t.stride()) for name, t in program.weights.items()}
    _prepare(program, "cpu", "bfloat16").run((torch.zeros(1, 3, 10, 10),))
    for name, (tensor, stride) in before.items():
        assert torch.equal(program.weights[name], tensor)
        assert program.weights[name].stride() == stride


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_precisions_that_a_cpu_does_not_have_are_refused(
    program: Program, precision: Precision
) -> None:
    with pytest.raises(BackendFailed, match=f"{precision} is not computed by PyTorch on a CPU"):
        _prepare(program, "cpu", precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(program: Program) -> None:
    with pytest.raises(BackendFailed, match="no CUDA device"):
        _prepare(program, "cuda:0")


def test_programs_that_cannot_be_served_row_by_row_are_refused() -> None:
    for module in (Total(), Similarity()):
        program = trace(module.eval(), (torch.zeros(1, 3),))
        with pytest.raises(BackendFailed, match="one row for each input row"):
            _prepare(program, "cpu")


@pytest.mark.parametrize("place", PLACES)
def test_several_inputs_and_outputs_keep_names_shapes_and_types(place: str) -> None:
    pair.check(_prepare(pair.program(), place))


def test_warm_up_runs_every_prepared_size(program: Program) -> None:
    prepared = _prepare(program, "cpu")
    sizes: list[int] = []
    run = prepared.run

    def counting(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sizes.append(len(batch[0]))
        return run(batch)

    prepared.run = counting  # type: ignore[method-assign]
    assert len(list(warm_up(prepared))) == 6
    assert sizes == [4, 4, 2, 2, 1, 1]


def test_an_unloaded_program_does_not_run(program: Program) -> None:
    prepared = _prepare(program, "cpu")
    prepared.close()
    with pytest.raises(BackendFailed, match="unloaded"):
        prepared.run((torch.zeros(1, 3, 10, 10),))


def test_integer_rows_stay_integers() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.5, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.float32) * self.scale

    program = trace(Lookup().eval(), (torch.zeros(1, 2, dtype=torch.int64),))
    prepared = _prepare(program, "cpu", "bfloat16")
    assert prepared.inputs[0].dtype == torch.int64
    assert prepared.run((torch.tensor([[2, 3]]),))[0].tolist() == [[1.0, 6.0]]


def test_padding_takes_the_next_prepared_size() -> None:
    assert [padded_size((1, 4, 8), rows) for rows in (1, 2, 4, 5, 8)] == [1, 4, 4, 8, 8]
    with pytest.raises(BackendFailed, match="9 rows were given at once"):
        padded_size((1, 4, 8), 9)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 6)), (8, (1, 2, 4, 8))]
)
def test_powers_of_two(largest: int, sizes: tuple[int, ...]) -> None:
    assert powers_of_two(largest) == sizes
