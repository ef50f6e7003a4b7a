"""Choosing between ways to run the same program, by measuring them on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeVar

Batch = TypeVar("Batch")


def fastest(
    candidates: Mapping[str, Callable[[Batch], object]],
    batches: Sequence[Batch],
    *,
    rounds: int = 5,
    margin: float = 0.02,
    budget_seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[None, None, tuple[str, dict[str, float]]]:
    """Name of the fastest candidate, and each one's latency relative to the first candidate's.

    A generator that gives way after every run and returns that pair.
    Candidates run in turn, `rounds` times after one warm-up; a candidate's figure is the product of
    its shortest latencies over `batches`, so each batch size counts alike. The shortest, because
    other work on the machine only ever adds time, and a choice should not depend on the weather.
    The first candidate is the default: another must beat it by `margin` to be chosen. Once the runs
    took `budget_seconds`, shared evenly among the batches, no further round begins; two are always
    measured.
    """
    scores = dict.fromkeys(candidates, 1.0)
    for batch in batches:
        spent = 0.0
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(rounds + 1):
            if turn > 2 and spent > budget_seconds / len(batches):
                break
            for name, run in candidates.items():
                start = clock()
                run(batch)
                taken = clock() - start
                spent += taken
                if turn:
                    seconds[name].append(taken)
                yield
        for name, samples in seconds.items():
            scores[name] *= min(samples)
    default = next(iter(candidates))
    relative = {n: (s / scores[default]) ** (1 / len(batches)) for n, s in scores.items()}
    best = min(relative, key=lambda name: relative[name])
    return (best if relative[best] < 1 - margin else default), relative
