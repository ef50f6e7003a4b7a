"""Whatever the program: fused equals unfused in float64, borders included, and never costs more.

One survey generates all programs and remembers what was wrong with any; the tests read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from service.fusion import Fusion, fuse, kernels
from service.fusion.constants import Constants
from service.fusion.cost import node_cost
from service.graph import Program, load_program, run, save_program
from tests.fusion.programs import programs
from tests.graph.builder import Builder

PROGRAMS = 2000
LEAST_FUSED = 0.5
"""Share of the generated programs in which something must have been fused."""
TOLERANCE = 1e-10


@dataclass
class Survey:
    """Counts, and for every kind of failure the smallest program that shows it."""

    counts: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)

    def blame(self, kind: str, program: Program, detail: str) -> None:
        self.counts[kind] += 1
        known = self.failures.get(kind)
        if known is None or len(program.nodes) < known[0]:
            nodes = "\n".join(str(node) for node in program.nodes)
            text = f"{detail}\n{program.inputs}\n{nodes}\noutputs {program.outputs}"
            self.failures[kind] = len(program.nodes), text


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def survey(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Survey:
    return examine(PROGRAMS, tmp_path_factory.mktemp("bundles") / "fused.safetensors")


def examine(count: int, path: Path) -> Survey:
    found = Survey()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs())
    def check(program: Program) -> None:
        found.counts["programs"] += 1
        fusion = fuse(program)
        found.counts["fused"] += bool(fusion.regions)
        found.counts["regions"] += len(fusion.regions)
        for region in fusion.regions:
            found.rules.update(rule.value for rule in region.form.rules)
        try:
            error = deviation(fusion)
        except RuntimeError as failed:
            found.blame("does not run", program, str(failed))
            return
        if not error <= TOLERANCE:
            found.blame("differs", program, f"by {error:.2e}")
        before, after = cost(program), cost(fusion.program)
        if not after <= before * (1 + 1e-9):
            found.blame("costs more", program, f"{after:,.0f} instead of {before:,.0f}")
        if not survives_storage(fusion.program, path):
            found.blame("changes in storage", program, "")

    check()
    return found


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


def inputs_of(program: Program, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(spec.sized(2), generator=generator, dtype=torch.float64) + 0.3
        for spec in program.inputs
    ]


def cost(program: Program) -> float:
    """What running the program costs, parameter-only nodes aside: they are folded at no gain."""
    specs, constants = program.specs(), Constants(program)
    return sum(node_cost(node, specs) for node in program.nodes if node.name not in constants)


def survives_storage(program: Program, path: Path) -> bool:
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


def test_enough_programs_fuse(survey: Survey, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{dict(survey.counts)}\n{dict(survey.rules)}")
    assert survey.counts["programs"] >= PROGRAMS
    assert survey.counts["fused"] >= LEAST_FUSED * survey.counts["programs"]
    for rule in ("conv-bn", "branch addition", "average pooling", "border fill", "linear layers"):
        assert survey.rules[rule] >= 50, rule


def test_fused_equals_unfused(survey: Survey) -> None:
    assert survey.failures.get("differs") is None, survey.failures["differs"][1]


def test_a_fused_program_runs(survey: Survey) -> None:
    assert survey.failures.get("does not run") is None, survey.failures["does not run"][1]


def test_fusing_never_raises_the_cost(survey: Survey) -> None:
    assert survey.failures.get("costs more") is None, survey.failures["costs more"][1]


def test_a_fused_program_is_stored_exactly(survey: Survey) -> None:
    assert survey.failures.get("changes in storage") is None


def test_the_survey_sees_an_engine_that_forgets_a_tap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = kernels.composed

    def forgetful(*args: object) -> Tensor:
        kernel = honest(*args).clone()  # type: ignore[arg-type]
        kernel.flatten()[-1] = 0.0
        return kernel

    monkeypatch.setattr(kernels, "composed", forgetful)
    assert examine(150, tmp_path / "fused.safetensors").counts["differs"] > 0


def test_the_cost_of_a_program_is_not_that_of_its_fused_form() -> None:
    build = Builder()
    x = build.input(4, 6, 6)
    fusion = fuse(build.program(build.add(build.conv(x, 4, (1, 1)), build.conv(x, 4, (1, 1)))))
    assert cost(fusion.program) < cost(fusion.source)
