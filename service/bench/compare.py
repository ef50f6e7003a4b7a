"""A latency comparison of two programs, from their callables to a result that can be kept.

Every round runs the baseline, the candidate, and the candidate once more as a control. The control
is what tells noise from difference; `verdict` says what may be concluded.
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from service.bench.measure import rounds
from service.bench.verdict import BatchComparison, BenchPlan, judge


@dataclass(frozen=True)
class Subject:
    """One side: its name, what runs a batch to its end, and how (device, backend, precision, …)."""

    name: str
    run: Callable[[Any], object]
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A whole comparison, one entry per batch size, with everything needed to read it later."""

    baseline: str
    candidate: str
    batches: tuple[BatchComparison, ...]
    descriptions: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any]
    plan: BenchPlan
    started: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; `started` is an ISO 8601 time in UTC."""
        return {
            "baseline": self.baseline,
            "candidate": self.candidate,
            "batches": [batch.to_dict() for batch in self.batches],
            "descriptions": {name: dict(value) for name, value in self.descriptions.items()},
            "environment": dict(self.environment),
            "plan": self.plan.to_dict(),
            "started": self.started,
            "seconds": self.seconds,
        }


def compare(
    baseline: Subject,
    candidate: Subject,
    make_input: Callable[[int], Any],
    plan: BenchPlan | None = None,
) -> Comparison:
    """Measure `candidate` against `baseline` on `make_input(batch_size)`, in this thread."""
    steps = compare_in_steps(baseline, candidate, make_input, plan)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Comparison = stop.value
            return result


def compare_in_steps(
    baseline: Subject,
    candidate: Subject,
    make_input: Callable[[int], Any],
    plan: BenchPlan | None = None,
) -> Generator[None, None, Comparison]:
    """`compare`, giving way after every sample, so that a busy device can serve in between."""
    plan = plan or BenchPlan()
    started, start = datetime.now(UTC), time.perf_counter()
    shuffle = random.Random(plan.seed)
    batches = []
    for position, size in enumerate(plan.batch_sizes):
        left = plan.budget_seconds - (time.perf_counter() - start)
        rows = make_input(size)
        arms = [_bind(subject, rows) for subject in (baseline, candidate, candidate)]
        measured = yield from rounds(
            arms,
            budget_seconds=left / (len(plan.batch_sizes) - position),
            warmup_seconds=min(plan.warmup_seconds, max(left, 0) / 20),
            sample_seconds=plan.sample_seconds,
            max_rounds=plan.max_rounds,
            shuffle=shuffle,
        )
        batches.append(judge(size, measured, plan, baseline.name, candidate.name))
    return Comparison(
        baseline=baseline.name,
        candidate=candidate.name,
        batches=tuple(batches),
        descriptions={s.name: dict(s.description) for s in (baseline, candidate)},
        environment=environment(),
        plan=plan,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - start, 3),
    )


def _bind(subject: Subject, rows: Any) -> Callable[[], object]:
    return lambda: subject.run(rows)


def environment() -> dict[str, Any]:
    """The machine and the libraries, as far as they explain a latency."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
