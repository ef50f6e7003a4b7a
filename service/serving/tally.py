"""Counting observations into buckets, as histograms are scraped."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tallied:
    """A histogram so far: observations up to each bound (cumulative, no infinity), all, and sum."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    count: int
    total: float


class Tally:
    """Not locked: whoever adds from several threads brings the lock; a reader may lag by one."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def read(self) -> Tallied:
        """A snapshot."""
        cumulative = []
        below = 0
        for count in self._counts[:-1]:
            below += count
            cumulative.append(below)
        return Tallied(self._bounds, tuple(cumulative), below + self._counts[-1], self._total)
