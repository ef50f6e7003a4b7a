"""Tracing gives what the module computes, from the export as it is where that is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from service.errors import UnsupportedOperator
from service.graph import from_exported, run, trace
from tests.graph import steps

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def functionalised(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Gets one entry whenever an export is traced once more to make it functional."""
    seen: list[None] = []
    original = ExportedProgram.run_decompositions

    def counted(self: ExportedProgram, table: object = None) -> ExportedProgram:
        seen.append(None)
        return original(self, table)  # type: ignore[arg-type]

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return seen


def _through_dropout(y: Tensor) -> Tensor:
    z = torch.dropout(y, 0.5, train=False)
    z.relu_()
    return y - 1


def _cast_to_itself(y: Tensor) -> Tensor:
    y.float().relu_()
    return y + 1


def _cast(y: Tensor) -> Tensor:
    y.double().relu_()
    return y + 1


def _half_a_split(y: Tensor) -> Tensor:
    a, b = y.split([1, 3], 1)
    return torch.cat([b, a.sigmoid()], 1)


def _border(y: Tensor) -> Tensor:
    y = nn.functional.pad(y, (1, 1, 1, 1))
    y[:, :, 0:1, :] = torch.arange(4.0).reshape(1, 4, 1, 1)
    return y


def _wider(y: Tensor) -> Tensor:
    return y.add_(torch.ones(1, dtype=torch.float64)).float()


def _copy_asked_for(y: Tensor) -> Tensor:
    y.to(torch.float32, copy=True).relu_()
    return y + 1


@pytest.mark.parametrize(
    ("step", "twice"),
    [
        (steps.read_again, False),
        (steps.through_detach, False),
        (_through_dropout, False),
        (steps.view_of_the_result, False),
        (_cast_to_itself, False),
        (_cast, False),
        (_half_a_split, False),
        (steps.write_through_view, True),
        (steps.view_read_late, True),
        (_border, True),
        (_wider, True),
        (_copy_asked_for, True),
    ],
)
def test_in_place_calls_keep_their_meaning(
    functionalised: list[None], step: Callable[[Tensor], Tensor], twice: bool
) -> None:
    module = steps.Step(step).eval()
    program = trace(module, (IMAGE,))
    assert bool(functionalised) == twice
    for batch in (1, 2, 5):
        x = torch.randn(batch, *IMAGE.shape[1:])
        with torch.no_grad():
            wanted = module(x.clone())
        torch.testing.assert_close(run(program, x)[0], wanted)


@pytest.mark.parametrize(
    ("step", "operator"),
    [(lambda y: y.sort(1)[0], "aten.sort"), (steps.whole_read_late, "aten.select_scatter")],
)
def test_what_a_second_tracing_does_not_mend_is_refused_by_name(
    step: Callable[[Tensor], Tensor], operator: str
) -> None:
    with pytest.raises(UnsupportedOperator, match=operator):
        trace(steps.Step(step).eval(), (IMAGE,))


@pytest.mark.parametrize(
    ("part", "why"), [(nn.Dropout(0.5), "dropout"), (nn.BatchNorm2d(4), "batch_norm")]
)
def test_an_export_in_training_mode_is_refused(part: nn.Module, why: str) -> None:
    exported = torch.export.export(steps.Step(part).train(), (IMAGE,))
    with pytest.raises(UnsupportedOperator, match=why):
        from_exported(exported)
