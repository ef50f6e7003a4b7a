"""Whole comparisons of real callables: a true difference is claimed, an invented one is not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from service.bench import BenchPlan, Comparison, Subject, compare, compare_in_steps

PLAN = BenchPlan(batch_sizes=(1, 4), budget_seconds=1.2, warmup_seconds=0.01, control_tolerance=0.1)


def _sleeper(seconds: float) -> Callable[[Tensor], Tensor]:
    def run(batch: Tensor) -> Tensor:
        time.sleep(seconds * len(batch))
        return batch

    return run


def _input(size: int) -> Tensor:
    return torch.zeros(size, 2)


def test_a_callable_that_sleeps_longer_is_found_out() -> None:
    slow = Subject("training form", _sleeper(0.004), {"device": "none", "precision": "float32"})
    fast = Subject("deploy form", _sleeper(0.002), {"device": "none"})
    result = compare(slow, fast, _input, PLAN)
    assert [batch.verdict for batch in result.batches] == ["faster", "faster"]
    assert all(1.5 < batch.ratio < 2.3 for batch in result.batches)
    backwards = compare(fast, slow, _input, PLAN)
    assert [batch.verdict for batch in backwards.batches] == ["slower", "slower"]


def test_a_callable_against_itself_gives_no_claim() -> None:
    same = Subject("deploy form", _sleeper(0.002))
    plan = replace(PLAN, batch_sizes=(1, 2, 4))
    result = compare(Subject("again", same.run), same, _input, plan)
    # A 95 % interval errs once in twenty: a claim at one size is bad luck, at every size a fault.
    assert any(batch.saving_percent is None for batch in result.batches)
    assert all(abs(batch.ratio - 1) < 0.1 for batch in result.batches)


def test_the_result_says_what_was_measured_where_and_when() -> None:
    subject = Subject("a", _sleeper(0.001), {"device": "a cpu", "threads": 2})
    plan = BenchPlan(batch_sizes=(2,), budget_seconds=0.2, warmup_seconds=0)
    data = json.loads(
        json.dumps(compare(subject, Subject("b", subject.run), _input, plan).to_dict())
    )
    assert data["descriptions"]["a"] == {"device": "a cpu", "threads": 2}
    assert data["environment"]["torch"] == str(torch.__version__)
    assert data["environment"]["torch_threads"] == torch.get_num_threads()
    assert data["started"].endswith("+00:00")
    assert data["plan"]["batch_sizes"] == [2]
    assert [batch["batch_size"] for batch in data["batches"]] == [2]
    assert 0.1 < data["seconds"] < 2


def test_the_budget_bounds_all_sizes_together() -> None:
    subject = Subject("a", _sleeper(0.001))
    plan = BenchPlan(batch_sizes=(1, 2, 4, 8), budget_seconds=0.8, max_rounds=10**6)
    started = time.perf_counter()
    result = compare(subject, Subject("b", subject.run), _input, plan)
    assert 0.5 < time.perf_counter() - started < 2.5
    assert len(result.batches) == 4


def test_steps_let_other_work_in_between_without_counting_it() -> None:
    subject = Subject("a", _sleeper(0.001))
    plan = BenchPlan(batch_sizes=(1,), budget_seconds=5, warmup_seconds=0, max_rounds=12)
    steps = compare_in_steps(subject, Subject("b", subject.run), _input, plan)
    count, result = 0, None
    while result is None:
        try:
            next(steps)
            count += 1
            time.sleep(0.01)  # somebody else's batch
        except StopIteration as stop:
            result = stop.value
    assert isinstance(result, Comparison)
    assert count >= 12 * 3
    assert result.batches[0].baseline.p50 < 0.008
