"""Once a program is warm nothing is left to do for the first time: no choice, no compilation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.graph import Program, trace
from service.serving import Choices, Prepared, backend_named, random_rows
from service.serving.backends import openvino_backend, torch_cpu

SIZES = (1, 2, 4, 8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return trace(Small().eval(), (torch.zeros(1, 8, 24, 24),))


def _warm(program: Program, name: str, choices: Choices | None = None) -> Prepared:
    prepared = backend_named(name, choices or Choices()).prepare(program, "cpu", "float32", SIZES)
    list(prepared.warm())
    return prepared


def _never(what: str) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        raise AssertionError(f"{what} while serving")

    return call


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_nothing_is_compiled_or_chosen_while_serving(
    program: Program, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = Choices()
    prepared = _warm(program, name, choices)
    for module, names in (
        (openvino_backend, ("to_exported", "_converted", "_openvino")),
        (torch_cpu, ("PrepackedModule", "ProgramModule", "computing_program")),
    ):
        for each in names:
            monkeypatch.setattr(module, each, _never(each))
    monkeypatch.setattr(Choices, "choose", _never("a choice"))
    for rows in range(1, SIZES[-1] + 1):
        (output,) = prepared.run(random_rows(prepared.inputs, rows))
        assert output.shape == (rows, 8)
    # The control: what is not warm yet does need them.
    with pytest.raises(AssertionError, match="while serving"):
        _warm(program, name)


PAUSE_SECONDS = 0.005


@pytest.mark.soak(share=0.01)
@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_the_first_request_takes_hardly_longer_than_the_median(program: Program, name: str) -> None:
    """The better of a few programs, because other work on the machine only ever adds time.

    Every request here comes after a pause, as the first does: an engine's threads sleep by then,
    and of a network that takes microseconds waking them is the greater part. Compiling anything
    would take tens of milliseconds.
    """
    late = []
    for _ in range(5):
        prepared = _warm(program, name)
        batch = random_rows(prepared.inputs, 1)
        seconds = []
        for _ in range(41):
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            prepared.run(batch)
            seconds.append(time.perf_counter() - started)
        late.append(seconds[0] / statistics.median(seconds))
        prepared.close()
    assert min(late) <= 1.5
