"""Timing callables against each other: warm-up, then rounds in which each runs once, shuffled."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], float]


@dataclass(frozen=True)
class Rounds:
    """Seconds per call, `seconds[arm, round]`; each sample is the mean of `calls_per_sample`."""

    seconds: NDArray[np.float64]
    calls_per_sample: int


def rounds(
    arms: Sequence[Callable[[], object]],
    *,
    budget_seconds: float,
    warmup_seconds: float,
    sample_seconds: float,
    max_rounds: int,
    shuffle: random.Random,
    clock: Clock = time.perf_counter,
) -> Generator[None, None, Rounds]:
    """Measure every arm once per round in random order until the budget or `max_rounds` is spent.

    Interleaving makes a slow minute hit every arm alike; shuffling does the same for whatever an
    arm leaves behind in the caches. Calls shorter than `sample_seconds` are timed several at a
    time. The generator yields after every sample, so that other work can be let in between. A round
    that the budget's end interrupts is dropped, so all arms have equally many samples; the first
    round is always finished.
    """
    end = clock() + budget_seconds
    calls = 1
    for arm in arms:
        calls = max(calls, (yield from _warm(arm, warmup_seconds, sample_seconds, clock)))
    done: list[list[float]] = []
    while not done or (len(done) < max_rounds and clock() < end):
        sample = [0.0] * len(arms)
        for index in shuffle.sample(range(len(arms)), len(arms)):
            if done and clock() >= end:
                break
            sample[index] = _time(arms[index], calls, clock)
            yield
        else:
            done.append(sample)
    return Rounds(np.array(done, dtype=np.float64).reshape(-1, len(arms)).T, calls)


def _warm(
    arm: Callable[[], object], warmup_seconds: float, sample_seconds: float, clock: Clock
) -> Generator[None, None, int]:
    """Run `arm` twice and then for `warmup_seconds`; how many calls fill one sample."""
    end = clock() + warmup_seconds
    best, runs = float("inf"), 0
    while runs < 2 or clock() < end:
        best = min(best, _time(arm, 1, clock))
        runs += 1
        yield
    return max(1, int(np.ceil(sample_seconds / max(best, 1e-7))))


def _time(arm: Callable[[], object], calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        arm()
    return (clock() - start) / calls
