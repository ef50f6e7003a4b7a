"""Whatever the program: fused equals unfused in float64, borders included, and never costs more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from service.fusion import Fusion, fuse
from service.fusion.constants import Constants
from service.fusion.cost import node_cost
from service.graph import Program, load_program, run, save_program
from tests.fusion.programs import programs

PROGRAMS = 2000
LEAST_FUSED = 0.6
"""Share of the generated programs in which something must have been fused."""
TOLERANCE = 1e-10

_seen: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of(program: Program, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(spec.sized(2), generator=generator, dtype=torch.float64) + 0.3
        for spec in program.inputs
    ]


def deviation(fusion: Fusion) -> float:
    """The largest difference between fused and unfused outputs in float64.

    Relative to the largest output, or to 1 where outputs are smaller than that.
    """
    inputs = inputs_of(fusion.source)
    before = run(fusion.source.to("float64"), *inputs)
    after = run(fusion.program_in("float64"), *inputs)
    assert [a.shape for a in after] == [b.shape for b in before]
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        assert bool(old.isfinite().all())
        scale = max(1.0, float(old.abs().amax()))
        worst = max(worst, float((old - new).abs().amax()) / scale)
    return worst


def cost(program: Program) -> float:
    """What running the program costs, parameter-only nodes aside: they are folded at no gain."""
    specs, constants = program.specs(), Constants(program)
    return sum(node_cost(node, specs) for node in program.nodes if node.name not in constants)


@settings(
    max_examples=PROGRAMS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(program=programs())
def check_program(folder: Path, program: Program) -> None:
    fusion = fuse(program)
    _seen["programs"] += 1
    _seen["fused"] += bool(fusion.regions)
    _seen["regions"] += len(fusion.regions)
    for region in fusion.regions:
        _seen.update(rule.value for rule in region.form.rules)
    assert deviation(fusion) <= TOLERANCE
    assert cost(fusion.program) <= cost(program) * (1 + 1e-9)
    assert load_and_compare(fusion.program, folder / "fused.safetensors")


def load_and_compare(program: Program, path: Path) -> bool:
    """Whether what is saved is what is loaded, to the bit."""
    save_program(program, path)
    loaded = load_program(path)
    same = (loaded.inputs, loaded.nodes, loaded.outputs) == (
        program.inputs,
        program.nodes,
        program.outputs,
    )
    return same and all(
        torch.equal(loaded.weights[name], tensor) for name, tensor in program.weights.items()
    )


@pytest.mark.timeout(900)
def test_fused_equals_unfused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _seen.clear()
    check_program(tmp_path)
    assert _seen["programs"] >= PROGRAMS
    assert _seen["fused"] >= LEAST_FUSED * _seen["programs"]
    with capsys.disabled():
        print(f"\n{dict(_seen)}")
