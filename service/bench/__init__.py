"""Honest latency measurement: interleaved A/B, an A/A control, a confidence interval, a verdict."""

from service.bench.compare import (
    Comparison,
    Subject,
    compare,
    compare_in_steps,
    environment,
)
from service.bench.statistics import Interval, Quantiles
from service.bench.verdict import BatchComparison, BenchPlan, Verdict

__all__ = [
    "BatchComparison",
    "BenchPlan",
    "Comparison",
    "Interval",
    "Quantiles",
    "Subject",
    "Verdict",
    "compare",
    "compare_in_steps",
    "environment",
]
