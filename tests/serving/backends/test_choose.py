"""Choosing the fastest candidate on a clock that only the candidates move."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from service.serving.backends.choose import fastest


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, *seconds_per_row: float) -> Callable[[Tensor], None]:
        """A candidate that takes the given times in turn, the last one from then on."""
        left = list(seconds_per_row)

        def run(batch: Tensor) -> None:
            self.now += (left.pop(0) if len(left) > 1 else left[0]) * len(batch)

        return run


def _chosen(
    candidates: Mapping[str, Callable[[Tensor], object]], batches: list[Tensor], clock: Clock
) -> tuple[str, dict[str, float]]:
    steps = fastest(candidates, batches, clock=clock)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: tuple[str, dict[str, float]] = stop.value
            return result


BATCHES = [torch.zeros(1), torch.zeros(8)]


def test_the_fastest_wins_and_figures_are_relative_to_the_default() -> None:
    clock = Clock()
    candidates = {"a": clock.taking(1.0), "b": clock.taking(0.5), "c": clock.taking(2.0)}
    name, relative = _chosen(candidates, BATCHES, clock)
    assert name == "b"
    assert relative == pytest.approx({"a": 1.0, "b": 0.5, "c": 2.0})


def test_a_hair_is_not_enough_to_leave_the_default() -> None:
    clock = Clock()
    assert _chosen({"a": clock.taking(1.0), "b": clock.taking(0.99)}, BATCHES, clock)[0] == "a"
    assert _chosen({"a": clock.taking(1.0), "b": clock.taking(0.97)}, BATCHES, clock)[0] == "b"


def test_the_first_run_and_stalls_do_not_count() -> None:
    clock = Clock()
    slow_start = clock.taking(60.0, 9.0, 0.5, 9.0, 8.0, 0.5)
    name, _ = _chosen({"a": clock.taking(1.0), "b": slow_start}, BATCHES[:1], clock)
    assert name == "b"


def test_every_batch_size_counts_alike() -> None:
    clock = Clock()

    def better_on_large(batch: Tensor) -> None:
        clock.now += 1.5 if len(batch) == 1 else 4.0

    _, relative = _chosen({"a": clock.taking(1.0), "b": better_on_large}, BATCHES, clock)
    assert relative["b"] == pytest.approx((1.5 * 0.5) ** 0.5)
