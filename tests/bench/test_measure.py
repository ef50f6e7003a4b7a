"""The measuring loop on a clock that only the arms move."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from service.bench.measure import Rounds, rounds


class Clock:
    """Time that passes only while an arm runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def arm(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def _measure(clock: Clock, arms: Sequence[Callable[[], object]], **changes: float) -> Rounds:
    options = {
        "budget_seconds": 10.0,
        "warmup_seconds": 0.0,
        "sample_seconds": 0.0,
        "max_rounds": 1000,
    } | changes
    steps = rounds(arms, shuffle=random.Random(0), clock=clock, **options)  # type: ignore[arg-type]
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Rounds = stop.value
            return result


def test_every_arm_gets_its_own_time_in_every_round() -> None:
    clock = Clock()
    result = _measure(clock, [clock.arm("a", 0.2), clock.arm("b", 0.1)], max_rounds=7)
    assert result.seconds.shape == (2, 7)
    np.testing.assert_allclose(result.seconds[0], 0.2)
    np.testing.assert_allclose(result.seconds[1], 0.1)


def test_warm_up_is_not_measured_and_rounds_are_shuffled_but_complete() -> None:
    clock = Clock()
    _measure(clock, [clock.arm(name, 0.01) for name in "abc"], max_rounds=40)
    assert clock.log[:6] == ["a", "a", "b", "b", "c", "c"]
    measured = ["".join(clock.log[i : i + 3]) for i in range(6, len(clock.log), 3)]
    assert len(measured) == 40
    assert all(sorted(one) == ["a", "b", "c"] for one in measured)
    assert len(set(measured)) > 3


def test_the_budget_is_kept_and_arms_have_equally_many_samples() -> None:
    clock = Clock()
    result = _measure(clock, [clock.arm("a", 0.3), clock.arm("b", 0.1)], budget_seconds=4.85)
    assert clock.now <= 4.85 + 0.3
    assert result.seconds.shape == (2, 10)  # (4.85 - 0.8 of warm-up) / 0.4, the broken one dropped


def test_one_round_is_measured_even_when_the_budget_is_too_small() -> None:
    clock = Clock()
    result = _measure(clock, [clock.arm("a", 9.0), clock.arm("b", 8.0)], budget_seconds=1.0)
    assert result.seconds.tolist() == [[9.0], [8.0]]


def test_short_calls_are_timed_several_at_a_time() -> None:
    clock = Clock()
    arms = [clock.arm("a", 0.0004), clock.arm("b", 0.001)]
    result = _measure(clock, arms, sample_seconds=0.002, max_rounds=3)
    assert result.calls_per_sample == 5
    np.testing.assert_allclose(result.seconds[:, 0], [0.0004, 0.001])


def test_it_gives_way_after_every_sample() -> None:
    clock = Clock()
    arms = [clock.arm("a", 0.1), clock.arm("b", 0.1)]
    steps = rounds(
        arms,
        budget_seconds=9,
        warmup_seconds=0,
        sample_seconds=0,
        max_rounds=3,
        shuffle=random.Random(0),
        clock=clock,
    )
    assert sum(1 for _ in steps) == 2 * 2 + 2 * 3


def test_a_failing_arm_is_not_hidden() -> None:
    def fail() -> None:
        raise RuntimeError("the arm broke")

    with pytest.raises(RuntimeError, match="the arm broke"):
        _measure(Clock(), [fail])
