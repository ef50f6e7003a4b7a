"""PyTorch on a CUDA device: lanes, grey levels, precisions, and the flags that it leaves alone."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from service.graph import Program, trace
from service.serving import BatchPart, Levels, Precision
from service.serving.backends.choices import Choices
from service.serving.backends.cuda_lane import arithmetic
from service.serving.backends.epilogues import relu_after
from service.serving.backends.parts import joined
from service.serving.backends.torch_cuda import LANES, TorchCuda

LEVELS = Levels((0.017, 0.018, 0.016), (2.1, 2.0, 1.8))
SIDE = 24
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Net(nn.Module):
    """Convolutions with a ReLU, without one, with groups, and one whose result is read twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 32, 3, padding=1)
        self.two = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=4, bias=False)
        self.three = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.head = nn.Linear(32, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        x = torch.relu(self.two(x))
        y = self.three(x)
        logits: Tensor = self.head((torch.relu(y) + y).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(Net().eval(), (torch.zeros(1, 3, SIDE, SIDE),))


def prepare(
    program: Program, precision: Precision = "float32", choices: Choices | None = None
) -> TorchCuda:
    prepared = TorchCuda(program, "cuda:0", precision, (1, 4, 8), choices)
    for _ in prepared.warm():
        pass
    return prepared


def images(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIDE, SIDE, generator=random)


def grey(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=random, dtype=torch.uint8)


def truth(rows: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = Net().double().eval()(rows.double())
    return logits


def off(found: Tensor, rows: Tensor) -> float:
    expected = truth(rows)
    return float((found.double() - expected).norm() / expected.norm())


def test_a_relu_is_absorbed_where_nothing_else_reads_the_convolution(program: Program) -> None:
    found = relu_after(program)
    convolutions = [node.name for node in program.nodes if node.op == "aten.conv2d"]
    assert list(found) == convolutions[:2]  # the third one's result is read twice
    assert {node.op for node in program.nodes if node.name in found.values()} == {"aten.relu"}


@on_gpu
@pytest.mark.gpu
def test_grey_levels_are_normalised_on_the_device_as_on_the_host(program: Program) -> None:
    prepared = prepare(program)
    assert prepared.streams is not None
    assert prepared.streams.parts is not None
    parts = [
        BatchPart((grey(2, 1),), LEVELS),
        BatchPart((images(1, 2),)),
        BatchPart((grey(3, 3),), LEVELS),
    ]
    (found,) = prepared.streams.parts(parts)
    (rows,) = joined(parts)
    assert torch.equal(found, prepared.run((rows,))[0])
    assert off(found, rows) < 1e-5
    (turned,) = prepared.streams.parts(parts[::-1])
    assert off(turned, rows) > 1e-2  # the control


@on_gpu
@pytest.mark.gpu
def test_lanes_run_at_once_and_mix_nothing_up(program: Program) -> None:
    prepared = prepare(program)
    assert prepared.streams is not None
    assert prepared.streams.count == LANES
    answers: list[tuple[Tensor, Tensor]] = []

    def ask(seed: int) -> None:
        for turn in range(40):
            rows = images(1 + (seed + turn) % 8, seed * 100 + turn)
            answers.append((rows, prepared.run((rows,))[0]))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(2 * LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 40 * len(threads)
    assert max(off(found, rows) for rows, found in answers) < 1e-4


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        ("float32", 0.0, 1e-5),
        ("tf32", 1e-5, 5e-3),
        ("float16", 1e-5, 5e-3),
        ("bfloat16", 1e-4, 3e-2),
    ],
)
def test_it_computes_in_the_precision_that_was_asked_for(
    program: Program, precision: Precision, least: float, most: float
) -> None:
    prepared = prepare(program, precision)
    rows = images(8)
    (found,) = prepared.run((rows,))
    assert found.dtype == torch.float32
    assert least <= off(found, rows) < most
    assert not any("eagerly" in note for note in prepared.describe().notes)


@on_gpu
@pytest.mark.gpu
def test_the_layout_is_measured_once_and_remembered(program: Program) -> None:
    choices = Choices()
    first = prepare(program, choices=choices).describe()
    assert any(" took " in note for note in first.notes)
    again = prepare(program, choices=choices).describe()
    assert again.layout == first.layout
    assert not any(" took " in note for note in again.notes)


@on_gpu
@pytest.mark.gpu
def test_closing_gives_the_memory_back(program: Program) -> None:
    prepare(program).close()  # what the libraries keep for good is there after this
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    prepared = prepare(program)
    assert torch.cuda.memory_allocated() > before
    prepared.close()
    del prepared
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("tf32", [False, True])
def test_exporting_works_while_the_flags_are_set(tf32: bool) -> None:
    """`torch.export` asks by PyTorch's older names, and newer ones that differ made it fail."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with arithmetic(tf32):
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert torch.backends.cudnn.conv.fp32_precision == ("tf32" if tf32 else "none")  # type: ignore[attr-defined]
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        trace(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
