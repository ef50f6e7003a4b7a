"""What may be said about which samples."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.bench.measure import Rounds
from service.bench.verdict import BatchComparison, BenchPlan, Verdict, judge


def _arm(median: float, spread: float, seed: int, count: int = 101) -> NDArray[np.float64]:
    """Samples whose median is exactly `median`."""
    samples = np.exp(np.random.default_rng(seed).normal(size=count) * spread)
    return np.asarray(samples / np.median(samples) * median)


def _judge(
    a: float, b: float, control: float, spread: float = 0.02, count: int = 101
) -> BatchComparison:
    arms = [_arm(value, spread, seed, count) for seed, value in enumerate((a, b, control))]
    return judge(4, Rounds(np.array(arms), 1), BenchPlan(), "training form", "deploy form")


@pytest.mark.parametrize(
    ("a", "b", "control", "spread", "verdict"),
    [
        (1.5, 1.0, 1.01, 0.02, "faster"),
        (1.0, 1.5, 1.49, 0.02, "slower"),
        (1.0, 1.0, 1.0, 0.02, "no difference shown"),
        (1.01, 1.0, 1.0, 0.20, "no difference shown"),
        (1.5, 1.0, 1.03, 0.02, "noisy"),
        (1.5, 1.0, 0.97, 0.02, "noisy"),
    ],
)
def test_verdicts(a: float, b: float, control: float, spread: float, verdict: Verdict) -> None:
    result = _judge(a, b, control, spread)
    assert result.verdict == verdict
    assert (result.saving_percent is not None) == (verdict in ("faster", "slower"))
    assert (result.saving_interval is None) == (result.saving_percent is None)


def test_a_claim_states_its_numbers() -> None:
    result = _judge(2.0, 1.0, 1.0)
    assert result.saving_percent == pytest.approx(50)
    assert result.saving_interval is not None
    assert result.saving_interval.holds(50)
    assert result.saving_interval.low > 47
    assert result.statement.startswith(
        "Batch 4: deploy form is 2.00 times as fast as training form (95% interval "
    )


def test_noise_and_shortage_are_said_in_words() -> None:
    assert "differed by 2.9%, more than 2.0%" in _judge(2.0, 1.0, 1.03).statement
    short = _judge(2.0, 1.0, 1.0, count=9)
    assert short.verdict == "too few rounds"
    assert short.saving_percent is None
    assert "9 rounds fitted the budget, 10 needed" in short.statement


def test_to_dict_is_json() -> None:
    import json

    data = json.loads(json.dumps(_judge(2.0, 1.0, 1.0).to_dict()))
    assert data["ratio"] == pytest.approx(2.0)
    assert data["ratio_interval"]["low"] <= 2 <= data["ratio_interval"]["high"]
    assert data["baseline"]["p50"] == pytest.approx(2.0)
    assert data["verdict"] == "faster"
