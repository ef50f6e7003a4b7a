"""OpenVINO as a backend, against the module in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from service.errors import BackendFailed
from service.graph import Program, trace
from service.serving import Precision, Prepared, backend_names
from service.serving.backends.choices import Choice, Choices
from service.serving.backends.openvino_backend import OpenVinoBackend
from tests.serving import pair

pytest.importorskip("openvino", reason="the optional package openvino is not installed")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.linear(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return logits, logits * 2


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def program(module: nn.Module) -> Program:
    return trace(module, (torch.zeros(1, 3, 10, 10),))


def _prepare(program: Program, precision: Precision = "float32", largest: int = 6) -> Prepared:
    prepared = OpenVinoBackend().prepare(program, "cpu", precision, (1, largest))
    list(prepared.warm())
    return prepared


@pytest.fixture(scope="module")
def shared(program: Program) -> Prepared:
    """Prepared once for the tests that only run it: exporting a program takes a second."""
    return _prepare(program)


def test_nothing_is_reported_to_its_makers() -> None:
    """In a fresh process, because whoever imports the package first decides."""
    code = (
        "import sys; from service.serving.backends.openvino_backend import _openvino;"
        "_openvino().convert_model; import openvino.tools.ovc.telemetry_utils as used;"
        "print(used.tm.__name__, sorted(n for n in sys.modules if n.startswith('openvino_tele')))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == "openvino.tools.ovc.telemetry_stub"
    assert "['openvino_telemetry']" in done.stdout  # the entry that hides it, and no submodule


def test_several_inputs_and_outputs_keep_names_shapes_and_types() -> None:
    pair.check(_prepare(pair.program()))


def test_it_is_listed() -> None:
    assert backend_names() == ("torch", "openvino")


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_every_number_of_rows_gives_the_modules_outputs_in_order(
    module: nn.Module, program: Program, precision: Precision, tolerance: float
) -> None:
    prepared = _prepare(program, precision)
    double = Small().double().eval()
    double.load_state_dict(module.state_dict())
    for size in (1, 2, 3, 5, 6):  # one row on all threads, more in pieces of equal and other sizes
        batch = torch.randn(size, 3, 10, 10, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            truth = double(batch.double())[0]
        logits, twice = prepared.run((batch,))
        assert logits.shape == (size, 5)
        assert logits.dtype == torch.float32
        errors = (logits.double() - truth).norm(dim=1) / truth.norm(dim=1)
        assert errors.max() < tolerance
        torch.testing.assert_close(twice, logits * 2, rtol=1e-2, atol=1e-3)
        if precision == "float32":
            assert not torch.allclose(logits[:1].double(), truth[-1:], rtol=1e-5) or size == 1


def test_a_later_run_does_not_overwrite_an_earlier_answer(shared: Prepared) -> None:
    for size in (1, 4):
        first = shared.run((torch.ones(size, 3, 10, 10),))[0]
        kept = first.clone()
        shared.run((torch.full((size, 3, 10, 10), -3.0),))
        assert torch.equal(first, kept)


def test_rows_in_any_memory_format_are_accepted(shared: Prepared) -> None:
    batch = torch.randn(4, 3, 10, 10)
    last = batch.contiguous(memory_format=torch.channels_last)
    assert torch.equal(shared.run((batch,))[0], shared.run((last,))[0])


def test_the_description_says_how_threads_are_used(program: Program, shared: Prepared) -> None:
    data = shared.describe().to_dict()
    assert (data["backend"], data["precision"]) == ("openvino", "float32")
    ways = ("1 x 1 thread", "2 x 1 thread", "1 x 2 threads")
    assert data["layout"].partition(";")[0] in ways
    assert any(note.startswith("together took") for note in data["notes"])
    assert _prepare(program, largest=1).describe().layout in (ways[0], ways[2])


@pytest.mark.parametrize("way", ["together", "apart", "alone"])
def test_every_way_to_use_the_threads_gives_the_same_rows(program: Program, way: str) -> None:
    choices = _Always(way)
    prepared = OpenVinoBackend(choices).prepare(program, "cpu", "float32", (1, 6))
    list(prepared.warm())
    batch = torch.randn(5, 3, 10, 10)
    alone = torch.cat([prepared.run((row[None],))[0] for row in batch])
    torch.testing.assert_close(prepared.run((batch,))[0], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(prepared.run((batch.flip(0),))[0], alone)


def test_streams_run_beside_each_other_and_give_the_same_rows(program: Program) -> None:
    prepared = OpenVinoBackend(_Always("apart")).prepare(program, "cpu", "float32", (1, 6))
    assert prepared.streams is None, "not known before it is warm"
    list(prepared.warm())
    streams = prepared.streams
    assert streams is not None
    assert (streams.count, streams.rows in (1, 2, 4, 6)) == (2, True)
    batches = [torch.randn(3, 3, 10, 10) for _ in range(40)]
    expected = [prepared.run((batch,))[0] for batch in batches]
    with ThreadPoolExecutor(4) as pool:  # more than there are streams: the others wait
        found = [out[0] for out in pool.map(lambda batch: streams.run((batch,)), batches)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], expected[1])
    prepared.close()
    assert prepared.streams is None


@pytest.mark.parametrize("way", ["together", "alone"])
def test_there_are_streams_only_where_one_piece_a_core_is_the_fastest(
    program: Program, way: str
) -> None:
    prepared = OpenVinoBackend(_Always(way)).prepare(program, "cpu", "float32", (1, 6))
    list(prepared.warm())
    assert prepared.streams is None


class _Always(Choices):
    """Chooses one way, where it is a candidate."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def get(self, key: str) -> Choice | None:
        return Choice(self.way, {})


def test_what_it_cannot_do_is_refused(program: Program) -> None:
    backend = OpenVinoBackend()
    with pytest.raises(BackendFailed, match="runs on `cpu`"):
        backend.prepare(program, "cuda:0", "float32", (1,))
    with pytest.raises(BackendFailed, match="float16 is not computed"):
        backend.prepare(program, "cpu", "float16", (1,))


def test_an_unloaded_program_does_not_run(program: Program) -> None:
    prepared = _prepare(program)
    prepared.close()
    with pytest.raises(BackendFailed, match="unloaded"):
        prepared.run((torch.zeros(1, 3, 10, 10),))
