"""The memory of a run, told beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from service.errors import InvalidProgram, LimitExceeded
from service.graph import (
    Node,
    Program,
    Ref,
    TensorSpec,
    load_program,
    memory,
    peak_bytes,
    save_program,
    storage,
    trace,
)
from service.serving.runner import LoadOptions, _largest_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)


class Wide(nn.Module):
    """Two values of 4 * 64 floats a row live beside one another, then one of 64."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.repeat(1, 4), x.repeat(1, 4) * 2
        return (a + b).narrow(1, 0, 64)


def test_values_count_while_somebody_reads_them() -> None:
    program = trace(Wide().eval(), (torch.zeros(2, 64),))
    row = 64 * 4
    # x, the first repeat, the second and its double; x is gone by then
    assert peak_bytes(program, 1) in range(12 * row, 14 * row + 1)
    assert peak_bytes(program, 10) == 10 * peak_bytes(program, 1)


def test_a_program_that_cannot_take_a_batch_is_told() -> None:
    fixed = Program(
        inputs=(TensorSpec("x", (None, 4), "float32"),),
        nodes=(Node("y", "aten.view", {"self": Ref("x"), "size": (3, 4)}, (3, 4), "float32"),),
        outputs=("y",),
        weights={},
    )
    assert peak_bytes(fixed, 3) == 2 * 3 * 4 * 4
    with pytest.raises(InvalidProgram, match="batch of 5"):
        peak_bytes(fixed, 5)


def test_batches_that_take_too_much_are_not_prepared() -> None:
    program = trace(Wide().eval(), (torch.zeros(2, 64),))
    one = peak_bytes(program, 1)
    assert _largest_batch(program, LoadOptions()) == 32
    assert _largest_batch(program, LoadOptions(max_bytes=9 * one)) == 8
    assert _largest_batch(program, LoadOptions(max_bytes=one)) == 1
    with pytest.raises(LimitExceeded, match="max_activation_bytes"):
        _largest_batch(program, LoadOptions(max_bytes=one - 1))


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (MemoryError(), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 64 bytes"), RuntimeError),
        (RuntimeError("can't start new thread"), RuntimeError),
        # The control: whatever else an operator raises is the program's fault.
        (RuntimeError("The size of tensor a must match the size of tensor b"), InvalidProgram),
    ],
)
def test_a_process_without_memory_says_nothing_of_the_program(
    failure: Exception, raised: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = trace(Wide().eval(), (torch.zeros(2, 64),))
    path = tmp_path / "wide.safetensors"
    save_program(program, path)

    def fail(*args: object) -> None:
        raise failure

    for module in (memory, storage):
        monkeypatch.setattr(module, "evaluate", fail)
    for read in (lambda: peak_bytes(program, 1), lambda: load_program(path)):
        with pytest.raises(raised):
            read()
