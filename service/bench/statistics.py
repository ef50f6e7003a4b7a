"""The statistics of a latency comparison: pure functions of samples, all in seconds.

Latency on a shared machine is skewed and its noise comes in bursts. So: medians, never means; and
a bootstrap over blocks of neighbouring rounds, which keeps a burst together instead of treating its
samples as independent (Politis & Romano 1992, the circular block bootstrap; percentile interval
after Efron & Tibshirani 1993, section 13.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Samples = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Quantiles:
    """Spread of `count` samples in seconds, linearly interpolated between order statistics."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    count: int

    def to_dict(self) -> dict[str, float]:
        """A JSON-able form; the quantiles are in seconds."""
        return asdict(self)


@dataclass(frozen=True)
class Interval:
    """A confidence interval, `low <= high`."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside, ends included."""
        return self.low <= value <= self.high

    def to_dict(self) -> dict[str, float]:
        """A JSON-able form: `low` and `high`, in the unit of the interval."""
        return asdict(self)


def quantiles(samples: Samples) -> Quantiles:
    """The five quantiles that are reported. Raises ValueError without samples."""
    values = np.asarray(samples, dtype=np.float64)
    if not values.size:
        raise ValueError("there are no samples")
    p5, p25, p50, p75, p95 = (float(q) for q in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)))
    return Quantiles(p5, p25, p50, p75, p95, values.size)


def median_ratio(a: Samples, b: Samples) -> float:
    """median(a) / median(b): how many times as fast b is."""
    return float(np.median(a) / np.median(b))


def ratio_interval(
    a: Samples,
    b: Samples,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of median(a) / median(b), `a[i]` and `b[i]` measured in the same round.

    Rounds are drawn together, so a slow moment that hit both arms stays with both. Raises
    ValueError if the lengths differ or there are no samples.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or not first.size:
        raise ValueError("the arms need the same number of rounds, at least one")
    draws = block_draws(first.size, resamples, np.random.default_rng(seed))
    ratios = np.median(first[draws], axis=1) / np.median(second[draws], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Interval(float(low), float(high))


def block_draws(rounds: int, resamples: int, random: np.random.Generator) -> NDArray[np.intp]:
    """Indices [resamples, rounds] of a circular block bootstrap, blocks of rounds^(1/3)."""
    block = max(1, round(rounds ** (1 / 3)))
    starts = random.integers(rounds, size=(resamples, -(-rounds // block), 1))
    drawn = (starts + np.arange(block)) % rounds
    return drawn.reshape(resamples, -1)[:, :rounds]


def saving_percent(ratio: float) -> float:
    """Share of the latency that is saved, in per cent: 100 (1 - 1/ratio)."""
    return 100 * (1 - 1 / ratio)
