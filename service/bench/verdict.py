"""Is the deploy form faster than the training form here, by how much, and may one say so?

The candidate is measured against itself as a control. If the same program measured twice differs by
more than the tolerance, the machine is too noisy for the ratio beside it, and nothing is claimed;
nor is it when the interval of the ratio holds 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from service.bench.measure import Rounds
from service.bench.statistics import (
    Interval,
    Quantiles,
    Samples,
    median_ratio,
    quantiles,
    ratio_interval,
    saving_percent,
)

Verdict = Literal["faster", "slower", "no difference shown", "noisy", "too few rounds"]


@dataclass(frozen=True)
class BenchPlan:
    """What to measure and how long.

    `batch_sizes` (rows); `budget_seconds` (s, all sizes together, bounds the whole measurement up
    to one call); `warmup_seconds` (s, per arm and size); `sample_seconds` (s): shorter calls are
    timed several at a time; `max_rounds` per size; `min_rounds`: fewer carry no claim;
    `confidence` of the interval; `resamples` of the bootstrap; `control_tolerance`: how far the
    control's ratio may lie from 1 (0.02 is 2 %); `seed` of order and bootstrap.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    budget_seconds: float = 20.0
    warmup_seconds: float = 0.3
    sample_seconds: float = 0.002
    max_rounds: int = 300
    min_rounds: int = 10
    confidence: float = 0.95
    resamples: int = 2000
    control_tolerance: float = 0.02
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: every field by its name, in the units above."""
        return {**self.__dict__, "batch_sizes": list(self.batch_sizes)}


@dataclass(frozen=True)
class BatchComparison:
    """The outcome at one batch size; latencies in seconds per batch.

    `ratio` is median(baseline) / median(candidate), `control_ratio` the same between the candidate
    and itself. `saving_percent` and its interval are None unless the verdict is a claim, which is
    `faster` or `slower`.
    """

    batch_size: int
    rounds: int
    calls_per_sample: int
    baseline: Quantiles
    candidate: Quantiles
    control: Quantiles
    ratio: float
    ratio_interval: Interval
    control_ratio: float
    control_interval: Interval
    verdict: Verdict
    statement: str
    saving_percent: float | None
    saving_interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            key: value.to_dict() if isinstance(value, Quantiles | Interval) else value
            for key, value in vars(self).items()
        }


def judge(
    batch_size: int, measured: Rounds, plan: BenchPlan, baseline: str, candidate: str
) -> BatchComparison:
    """What the rounds of [baseline, candidate, control] show, and the sentence that may be said."""
    a, b, control = measured.seconds
    ratio, control_ratio = median_ratio(a, b), median_ratio(b, control)
    interval = _interval(a, b, plan)
    verdict = _verdict(len(a), interval, control_ratio, plan)
    claimed = verdict in ("faster", "slower")
    span = f"{plan.confidence:.0%} interval {interval.low:.2f} to {interval.high:.2f}"
    statement = {
        "faster": f"{candidate} is {ratio:.2f} times as fast as {baseline} ({span})",
        "slower": f"{candidate} takes {1 / ratio:.2f} times as long as {baseline} ({span})",
        "no difference shown": f"no difference shown between {baseline} and {candidate} ({span})",
        "noisy": (
            f"no claim: {candidate} against itself differed by {abs(control_ratio - 1):.1%}, "
            f"more than {plan.control_tolerance:.1%}"
        ),
        "too few rounds": f"no claim: {len(a)} rounds fitted the budget, {plan.min_rounds} needed",
    }[verdict]
    return BatchComparison(
        batch_size=batch_size,
        rounds=len(a),
        calls_per_sample=measured.calls_per_sample,
        baseline=quantiles(a),
        candidate=quantiles(b),
        control=quantiles(control),
        ratio=ratio,
        ratio_interval=interval,
        control_ratio=control_ratio,
        control_interval=_interval(b, control, plan),
        verdict=verdict,
        statement=f"Batch {batch_size}: {statement}.",
        saving_percent=saving_percent(ratio) if claimed else None,
        saving_interval=(
            Interval(saving_percent(interval.low), saving_percent(interval.high))
            if claimed
            else None
        ),
    )


def _interval(a: Samples, b: Samples, plan: BenchPlan) -> Interval:
    return ratio_interval(
        a, b, confidence=plan.confidence, resamples=plan.resamples, seed=plan.seed
    )


def _verdict(count: int, interval: Interval, control_ratio: float, plan: BenchPlan) -> Verdict:
    if count < plan.min_rounds:
        return "too few rounds"
    if abs(control_ratio - 1) > plan.control_tolerance:
        return "noisy"
    if interval.holds(1.0):
        return "no difference shown"
    return "faster" if interval.low > 1 else "slower"
