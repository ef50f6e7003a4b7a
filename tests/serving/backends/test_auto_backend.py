"""The automatic choice: agreement first, then speed, remembered, and said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from service.errors import BackendFailed, CertificateFailed, InvalidConfig
from service.graph import Program, trace
from service.serving import Description, Precision, Prepared, RowSpec, backend_named
from service.serving.backends.accuracy import relative_difference
from service.serving.backends.auto_backend import AutoBackend
from service.serving.backends.choices import Choice, Choices, choice_key, structure


class Fake:
    """A backend that answers `answer(rows)` after `seconds` a row, and counts what happens."""

    def __init__(
        self,
        name: str,
        seconds: float = 0.0,
        answer: Callable[[Tensor], Tensor] = lambda rows: rows * 2,
        refuses: bool = False,
    ) -> None:
        self.name = name
        self.seconds = seconds
        self.answer = answer
        self.refuses = refuses
        self.made: list[FakePrepared] = []
        self.calibrations: list[tuple[Tensor, ...] | None] = []

    def prepare(
        self,
        program: Program,
        device: str,
        precision: Precision,
        batch_sizes: Sequence[int],
        calibration: tuple[Tensor, ...] | None = None,
    ) -> Prepared:
        self.calibrations.append(calibration)
        if self.refuses:
            raise BackendFailed("an operator is missing")
        self.made.append(FakePrepared(self, precision, tuple(batch_sizes)))
        return self.made[-1]


class FakePrepared:
    def __init__(self, backend: Fake, precision: Precision, batch_sizes: tuple[int, ...]) -> None:
        self.backend, self.precision, self.batch_sizes = backend, precision, batch_sizes
        self.inputs = self.outputs = (RowSpec("input_0", (3,), torch.float32),)
        self.runs, self.closed = 0, False

    def warm(self) -> Iterator[None]:
        yield

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (batch,) = inputs
        assert not self.closed
        self.runs += 1
        time.sleep(self.backend.seconds * len(batch))
        return (self.backend.answer(batch),)

    def describe(self) -> Description:
        return Description(
            self.backend.name, "0", "none", "cpu", self.precision, 1, "", self.batch_sizes, 0
        )

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(nn.ReLU().eval(), (torch.zeros(1, 3),))


def _auto(*candidates: Fake, choices: Choices | None = None) -> AutoBackend:
    """The first candidate is the reference too, as PyTorch is."""
    return AutoBackend(candidates, candidates[0], choices)


def _choose(
    auto: AutoBackend,
    program: Program,
    precision: Precision = "float32",
    calibration: tuple[Tensor, ...] | None = None,
) -> Prepared:
    prepared = auto.prepare(program, "cpu", precision, (1, 4), calibration)
    list(prepared.warm())
    return prepared


def test_the_faster_one_that_agrees_is_kept_and_the_other_closed(program: Program) -> None:
    slow, fast = Fake("torch", 0.004), Fake("other", 0.001)
    prepared = _choose(_auto(slow, fast), program)
    about = prepared.describe()
    assert about.backend == "other"
    assert about.candidates["torch"] == 1
    assert about.candidates["other"] < 0.9
    assert about.accuracy["error"] == 0
    assert slow.made[0].closed
    assert not fast.made[0].closed
    assert torch.equal(prepared.run((torch.ones(2, 3),))[0], torch.full((2, 3), 2.0))
    prepared.close()
    assert fast.made[0].closed


def test_the_default_is_kept_when_nothing_beats_it(program: Program) -> None:
    prepared = _choose(_auto(Fake("torch", 0.001), Fake("other", 0.004)), program)
    assert prepared.describe().backend == "torch"
    assert torch.equal(prepared.run((torch.ones(1, 3),))[0], torch.full((1, 3), 2.0))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: rows * 2.01,
        lambda rows: rows.flip(0) * 2,
        lambda rows: rows * 2 + 0.01,
        lambda rows: rows * torch.nan,
    ],
)
def test_a_faster_one_that_disagrees_is_left_out(
    program: Program, wrong: Callable[[Tensor], Tensor]
) -> None:
    prepared = _choose(_auto(Fake("torch", 0.004), Fake("other", answer=wrong)), program)
    assert prepared.describe().backend == "torch"
    assert "differs from float32 by" in prepared.describe().notes[0]


def test_one_that_cannot_run_the_program_is_left_out(program: Program) -> None:
    prepared = _choose(_auto(Fake("torch"), Fake("other", refuses=True)), program)
    assert prepared.describe().backend == "torch"
    assert prepared.describe().notes == ("other was left out: an operator is missing",)


def test_one_must_be_able_to(program: Program) -> None:
    with pytest.raises(BackendFailed, match="an operator is missing"):
        _choose(_auto(Fake("torch", refuses=True), Fake("other", refuses=True)), program)


def test_the_choice_outlives_the_process_and_the_others_are_not_even_loaded(
    program: Program, tmp_path: Path
) -> None:
    file = tmp_path / "deeper" / "choices.json"
    slow, fast = Fake("torch", 0.004), Fake("other", 0.001)
    _choose(_auto(slow, fast, choices=Choices(file)), program)
    measured = fast.made[0].runs
    again = _choose(_auto(slow, fast, choices=Choices(file)), program)
    assert again.describe().backend == "other"
    assert again.describe().candidates["other"] < 0.9  # the figures of then
    assert fast.made[1].runs == 8  # the check alone
    assert measured > fast.made[1].runs
    best = Fake("torch", 0.0001)
    kept = _choose(_auto(best, Fake("other", 0.004), choices=Choices()), program)
    assert kept.describe().backend == "torch"
    # The remembered one cannot run here any more, so the default must.
    left = _choose(_auto(best, Fake("other", refuses=True), choices=Choices(file)), program)
    assert left.describe().backend == "torch"


def test_a_damaged_file_of_choices_costs_a_measurement_and_nothing_else(
    program: Program, tmp_path: Path
) -> None:
    for text in ("{", "[]", '{"a": 1}', '{"a": {"name": "b", "relative": {"c": "d"}}}', "null"):
        (tmp_path / "choices.json").write_text(text)
        choices = Choices(tmp_path / "choices.json")
        choices.put("key", Choice("name", {"name": 1.0}))
        assert Choices(tmp_path / "choices.json").get("key") == Choice("name", {"name": 1.0})
    blocked = Choices(tmp_path / "choices.json" / "below_a_file.json")
    blocked.put("key", Choice("name", {}))
    assert blocked.get("key") == Choice("name", {})


def test_a_choice_depends_on_structure_threads_and_what_was_asked(program: Program) -> None:
    other = trace(nn.Tanh().eval(), (torch.zeros(1, 3),))
    keys = {
        choice_key("backend", program, 1, "float32"),
        choice_key("backend", program, 2, "float32"),
        choice_key("backend", program, 1, "bfloat16"),
        choice_key("layout", program, 1, "float32"),
        choice_key("backend", other, 1, "float32"),
    }
    assert len(keys) == 5
    assert choice_key("backend", program, 1, "float32") in keys


def test_lower_precision_is_checked_against_float32(program: Program) -> None:
    def rounded(rows: Tensor) -> Tensor:
        return (rows * 2).bfloat16().float()

    torch_fake, other = Fake("torch", 0.004), Fake("other", answer=rounded)
    prepared = _choose(_auto(torch_fake, other), program, precision="bfloat16")
    assert prepared.describe().backend == "other"
    assert 1e-4 < prepared.describe().accuracy["error"] < 5e-2
    assert [made.precision for made in torch_fake.made] == ["bfloat16", "float32"]
    assert all(made.closed for made in torch_fake.made)
    strict = _choose(_auto(Fake("torch", 0.004), other), program)
    assert strict.describe().backend == "torch"


def test_a_lower_precision_that_no_engine_computes_well_is_refused_with_its_numbers(
    program: Program,
) -> None:
    def coarse(rows: Tensor) -> Tensor:
        return (rows * 4).round() / 2

    reference = Fake("torch")
    auto = AutoBackend([Fake("other", answer=coarse)], reference)
    with pytest.raises(CertificateFailed, match=r"other in bfloat16 differs") as refused:
        _choose(auto, program, precision="bfloat16")
    numbers = refused.value.extra["accuracy"]
    assert 0.05 < numbers["error"] < 1
    assert numbers["passed"] is False
    kept = AutoBackend([Fake("other", answer=coarse)], reference)  # in float32 there is a way out
    assert _choose(kept, program).describe().backend == "torch"


def test_own_inputs_set_ranges_with_one_half_and_certify_with_the_other(program: Program) -> None:
    own = (torch.arange(1.0, 13.0).reshape(-1, 1) * torch.tensor([[0.1, 0.2, 0.3]]),)

    def top_of_odd_rows(rows: Tensor) -> Tensor:
        """One row of the half that certifies changes its class."""
        return rows * 2 * (1 + 0.5 * (rows[:, :1] == own[0][1, 0]) * torch.tensor([1, 1, -1]))

    fake = Fake("other")
    prepared = _choose(AutoBackend([fake], Fake("torch")), program, "int8", own)
    assert prepared.describe().accuracy["top1_agreement"] == 1
    assert prepared.describe().accuracy["inputs"] == "calibration"
    assert prepared.describe().accuracy["rows"] == 6
    assert fake.calibrations[0] is not None
    assert torch.equal(fake.calibrations[0][0], own[0][::2])
    wrong = AutoBackend([Fake("other", answer=top_of_odd_rows)], Fake("torch"))
    with pytest.raises(CertificateFailed, match=r"top-1 agrees on 83\.3%"):
        _choose(wrong, program, "int8", own)
    with pytest.raises(InvalidConfig, match="rows of shape"):
        _choose(AutoBackend([fake], Fake("torch")), program, "int8", (torch.zeros(4, 2),))


def test_differences_are_relative_to_what_varies() -> None:
    truth = torch.tensor([[100.0, 1.0], [100.0, -1.0]])
    answer = truth + torch.tensor([[0.1, 0.0], [0.1, 0.0]])
    assert relative_difference(truth, answer) == pytest.approx(0.1, rel=1e-4)
    assert relative_difference(truth, truth) == 0
    assert relative_difference(truth[:1], answer[:1]) == pytest.approx(0.001, rel=1e-3)
    labels = torch.tensor([1, 2])
    assert relative_difference(labels, labels.clone()) == 0
    assert relative_difference(labels, labels.flip(0)) == 1


def test_the_structure_does_not_depend_on_weights_but_on_shapes() -> None:
    def traced(width: int) -> Program:
        return trace(nn.Linear(3, width).eval(), (torch.zeros(1, 3),))

    assert structure(traced(4)) == structure(traced(4))
    assert structure(traced(4)) != structure(traced(5))


def test_auto_serves_a_real_program(program: Program) -> None:
    prepared = backend_named("auto").prepare(program, "cpu", "float32", (1, 4))
    list(prepared.warm())
    assert prepared.describe().backend in ("torch", "openvino")
    rows = torch.tensor([[-1.0, 0.0, 2.0]])
    assert prepared.run((rows,))[0].tolist() == [[0.0, 0.0, 2.0]]
