"""Tracing gives what the module computes, from the export as it is where that is safe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from service.errors import UnsupportedOperator
from service.graph import from_exported, run, trace

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Step(nn.Module):
    """A network whose middle is given as a function."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.conv(x))


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


def _read_again(y: Tensor) -> Tensor:
    z = y * 2
    y.add_(1)
    return y + z


def _through_detach(y: Tensor) -> Tensor:
    z = y.detach()
    z.mul_(3)
    return y + z


def _through_dropout(y: Tensor) -> Tensor:
    z = torch.dropout(y, 0.5, train=False)
    z.relu_()
    return y - 1


def _view_of_the_result(y: Tensor) -> Tensor:
    return y.relu_().flatten(1).sub_(1)


def _cast_to_itself(y: Tensor) -> Tensor:
    y.float().relu_()
    return y + 1


def _cast(y: Tensor) -> Tensor:
    y.double().relu_()
    return y + 1


def _half_a_split(y: Tensor) -> Tensor:
    a, b = y.split([1, 3], 1)
    return torch.cat([b, a.sigmoid()], 1)


def _write_through_view(y: Tensor) -> Tensor:
    y[:, :2].mul_(0)
    return y


def _view_read_late(y: Tensor) -> Tensor:
    z = y.transpose(1, 2)
    y.relu_()
    return z + 1


def _part_read_late(y: Tensor) -> Tensor:
    y.unbind(1)[0].relu_()
    return y + 1


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
        (_read_again, False),
        (_through_detach, False),
        (_through_dropout, False),
        (_view_of_the_result, False),
        (_cast_to_itself, False),
        (_cast, False),
        (_half_a_split, False),
        (_write_through_view, True),
        (_view_read_late, True),
        (_border, True),
        (_wider, True),
        (_copy_asked_for, True),
    ],
)
def test_in_place_calls_keep_their_meaning(
    functionalised: list[None], step: Callable[[Tensor], Tensor], twice: bool
) -> None:
    module = Step(step).eval()
    program = trace(module, (IMAGE,))
    assert bool(functionalised) == twice
    for batch in (1, 2, 5):
        x = torch.randn(batch, *IMAGE.shape[1:])
        with torch.no_grad():
            wanted = module(x.clone())
        torch.testing.assert_close(run(program, x)[0], wanted)


@pytest.mark.parametrize(
    ("step", "operator"),
    [(lambda y: y.sort(1)[0], "aten.sort"), (_part_read_late, "aten.select_scatter")],
)
def test_what_a_second_tracing_does_not_mend_is_refused_by_name(
    step: Callable[[Tensor], Tensor], operator: str
) -> None:
    with pytest.raises(UnsupportedOperator, match=operator):
        trace(Step(step).eval(), (IMAGE,))


@pytest.mark.parametrize(
    ("part", "why"), [(nn.Dropout(0.5), "dropout"), (nn.BatchNorm2d(4), "batch_norm")]
)
def test_an_export_in_training_mode_is_refused(part: nn.Module, why: str) -> None:
    exported = torch.export.export(Step(part).train(), (IMAGE,))
    with pytest.raises(UnsupportedOperator, match=why):
        from_exported(exported)
