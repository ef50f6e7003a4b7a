"""The statistics against truths that can be worked out by hand or by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from service.bench.statistics import (
    Interval,
    block_draws,
    median_ratio,
    quantiles,
    ratio_interval,
    saving_percent,
)


def test_quantiles_of_a_ramp() -> None:
    result = quantiles(range(101))
    assert (result.p5, result.p25, result.p50, result.p75, result.p95) == (5, 25, 50, 75, 95)
    assert result.count == 101


def test_quantiles_interpolate_between_two_samples() -> None:
    assert quantiles([1.0, 2.0]).p25 == pytest.approx(1.25)


def test_quantiles_do_not_depend_on_order_and_need_a_sample() -> None:
    assert quantiles([3.0, 1.0, 2.0]) == quantiles([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no samples"):
        quantiles([])


def test_a_few_stalls_do_not_move_the_ratio() -> None:
    calm, stalled = [2.0] * 20, [2.0] * 15 + [50.0] * 5
    assert median_ratio(calm, [1.0] * 20) == median_ratio(stalled, [1.0] * 20) == 2.0


@pytest.mark.parametrize(("ratio", "saving"), [(1.0, 0.0), (2.0, 50.0), (4.0, 75.0), (0.5, -100.0)])
def test_saving_is_the_share_of_the_latency_that_is_gone(ratio: float, saving: float) -> None:
    assert saving_percent(ratio) == pytest.approx(saving)


def test_the_interval_is_a_point_without_noise() -> None:
    assert ratio_interval([3.0] * 9, [2.0] * 9) == Interval(1.5, 1.5)


def test_the_interval_is_reproducible_and_ordered() -> None:
    random = np.random.default_rng(3)
    a, b = random.lognormal(size=40), random.lognormal(size=40)
    first = ratio_interval(a, b, seed=5)
    assert first == ratio_interval(a, b, seed=5)
    assert first.low < median_ratio(a, b) < first.high


def test_a_slow_moment_shared_by_both_arms_hardly_widens_the_interval() -> None:
    random = np.random.default_rng(0)
    weather = random.lognormal(sigma=0.5, size=200)
    together = ratio_interval(1.5 * weather, weather)
    apart = ratio_interval(1.5 * weather, random.permutation(weather))
    assert together.low == pytest.approx(1.5)
    assert together.high == pytest.approx(1.5)
    assert apart.high - apart.low > 0.1


def _coverage(truth: float, bursts: bool) -> float:
    """Share of 200 simulated measurements of 60 rounds whose 95 % interval holds the truth."""
    random = np.random.default_rng(11)
    hits = 0
    for experiment in range(200):
        noise = random.normal(size=(2, 60)) * 0.2
        if bursts:  # an autoregressive process: neighbours resemble each other
            for step in range(1, 60):
                noise[:, step] += 0.5 * noise[:, step - 1]
        a, b = truth * np.exp(noise[0]), np.exp(noise[1])
        hits += ratio_interval(a, b, resamples=300, seed=experiment).holds(1.5)
    return hits / 200


def test_the_interval_holds_the_truth_about_as_often_as_it_promises() -> None:
    assert 0.90 <= _coverage(1.5, bursts=False) <= 1.0
    assert _coverage(1.5, bursts=True) >= 0.82


def test_the_coverage_check_notices_a_wrong_truth() -> None:
    assert _coverage(1.8, bursts=False) < 0.5


def test_arms_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same number"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        ratio_interval([], [])


def test_blocks_are_runs_of_neighbours_that_wrap_around() -> None:
    draws = block_draws(27, 50, np.random.default_rng(0))
    assert draws.shape == (50, 27)
    assert draws.min() >= 0
    assert draws.max() <= 26
    steps = np.diff(draws.reshape(50, 9, 3), axis=2) % 27
    assert (steps == 1).all()
    counts = np.bincount(draws.ravel(), minlength=27)
    assert counts.min() > 0.5 * counts.mean()
