"""The automatic choice: agreement first, then speed, remembered, and said."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from service.errors import BackendFailed
from service.graph import Program, trace
from service.serving import Description, Precision, Prepared, RowSpec, backend_named
from service.serving.backends.auto_backend import AutoBackend, relative_difference, structure


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

    def prepare(
        self, program: Program, device: str, precision: Precision, batch_sizes: Sequence[int]
    ) -> Prepared:
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


def _choose(
    auto: AutoBackend, program: Program, device: str = "cpu", precision: Precision = "float32"
) -> Prepared:
    prepared = auto.prepare(program, device, precision, (1, 4))
    list(prepared.warm())
    return prepared


def test_the_faster_one_that_agrees_is_kept_and_the_other_closed(program: Program) -> None:
    slow, fast = Fake("torch", 0.004), Fake("other", 0.001)
    prepared = _choose(AutoBackend([slow, fast]), program)
    about = prepared.describe()
    assert about.backend == "other"
    assert len(about.notes) == 1
    assert about.notes[0].startswith("other took 0.")
    assert slow.made[0].closed
    assert not fast.made[0].closed
    assert torch.equal(prepared.run((torch.ones(2, 3),))[0], torch.full((2, 3), 2.0))
    prepared.close()
    assert fast.made[0].closed


def test_the_default_is_kept_when_nothing_beats_it(program: Program) -> None:
    prepared = _choose(AutoBackend([Fake("torch", 0.001), Fake("other", 0.004)]), program)
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
    prepared = _choose(AutoBackend([Fake("torch", 0.004), Fake("other", answer=wrong)]), program)
    assert prepared.describe().backend == "torch"
    assert "other was left out: its outputs differ" in prepared.describe().notes[0]


def test_one_that_cannot_run_the_program_is_left_out(program: Program) -> None:
    prepared = _choose(AutoBackend([Fake("torch"), Fake("other", refuses=True)]), program)
    assert prepared.describe().backend == "torch"
    assert prepared.describe().notes == ("other was left out: an operator is missing",)


def test_the_default_must_be_able_to(program: Program) -> None:
    with pytest.raises(BackendFailed):
        AutoBackend([Fake("torch", refuses=True), Fake("other")]).prepare(
            program, "cpu", "float32", (1,)
        )


def test_the_choice_is_remembered_for_the_same_structure(program: Program) -> None:
    slow, fast = Fake("torch", 0.004), Fake("other", 0.001)
    auto = AutoBackend([slow, fast])
    _choose(auto, program)
    measured = fast.made[0].runs
    assert _choose(auto, program).describe().backend == "other"
    assert fast.made[1].runs == 1  # the check alone
    assert measured > fast.made[1].runs


def test_lower_precision_is_checked_against_float32(program: Program) -> None:
    def rounded(rows: Tensor) -> Tensor:
        return (rows * 2).bfloat16().float()

    torch_fake, other = Fake("torch", 0.004), Fake("other", answer=rounded)
    prepared = _choose(AutoBackend([torch_fake, other]), program, precision="bfloat16")
    assert prepared.describe().backend == "other"
    assert [made.precision for made in torch_fake.made] == ["bfloat16", "float32"]
    assert all(made.closed for made in torch_fake.made)
    strict = _choose(AutoBackend([Fake("torch", 0.004), other]), program)
    assert strict.describe().backend == "torch"


def test_elsewhere_than_on_a_cpu_the_default_runs(program: Program) -> None:
    other = Fake("other")
    prepared = _choose(AutoBackend([Fake("torch", 0.001), other]), program, device="cuda:0")
    assert prepared.describe().backend == "torch"
    assert other.made == []


def test_differences_are_relative_to_what_varies() -> None:
    truth = torch.tensor([[100.0, 1.0], [100.0, -1.0]])
    answer = truth + torch.tensor([[0.1, 0.0], [0.1, 0.0]])
    assert relative_difference(truth, answer) == pytest.approx(0.1, rel=1e-4)
    assert relative_difference(truth, truth) == 0
    assert relative_difference(truth[:1], answer[:1]) == pytest.approx(0.001, rel=1e-3)
    labels = torch.tensor([1, 2])
    assert relative_difference(labels, labels.clone()) == 0
    assert relative_difference(labels, labels.flip(0)) == float("inf")


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
