"""Promises: which are asked of which load, and how they are decided."""

from __future__ import annotations

import pytest

from benchmarks.promises import Promise, Round, lines, of_server, of_shares


@pytest.mark.parametrize(
    ("side", "figures", "verdict"),
    [
        ("at least", (2.0, 2.5), "held"),
        ("at least", (1.0, 1.5, 1.99), "NOT held"),
        ("at least", (1.0, 2.0, 2.0), "open (by the median held)"),
        ("at least", (1.0, 1.5, 3.0), "open (by the median NOT held)"),
        ("more than", (2.0,), "NOT held"),
        ("at most", (2.0, 1.0), "held"),
        ("at most", (2.1, 2.2), "NOT held"),
    ],
)
def test_the_median_decides_and_rounds_that_disagree_are_told(
    side: str, figures: tuple[float, ...], verdict: str
) -> None:
    promise = Promise("it", 2.0, figures, side)  # type: ignore[arg-type]
    assert promise.verdict == verdict
    assert list(lines([promise]))[-1].endswith(f"| {verdict} |")


def test_the_tiny_network_is_held_against_every_peer() -> None:
    rates = {"foldserve": 300.0, "fastapi": 100.0, "ray": 600.0, "nothing": 9e9}
    apart = rates | {"foldserve, HTTP apart": 700.0}
    both = [p.verdict for p in of_server("tiny", "binary", 1, [Round(apart, 0.1)])]
    assert both == ["held", "NOT held", "held", "held"], "and it is no peer of its own"
    found = {p.what: p.verdict for p in of_server("tiny", "binary", 1, [Round(rates, 0.1)])}
    assert found == {
        "tiny, binary, concurrency 1: requests a second over fastapi": "held",
        "tiny, binary, concurrency 1: requests a second over ray": "NOT held",
    }


def test_the_real_network_is_held_against_the_bound_the_best_peer_and_the_ideal() -> None:
    # The best peer differs between the rounds; the ideal p99 of 8 callers is 80 ms.
    one = Round({"foldserve": 90, "in-process": 100, "a": 60, "b": 30, "nothing": 9e9}, 0.120)
    two = Round({"foldserve": 80, "in-process": 100, "a": 30, "b": 40, "nothing": 9e9}, 0.121)
    share, best, ideal = of_server("RepVGG-A0", "binary", 8, [one, two])
    assert share.figures == (0.9, 0.8)
    assert best.figures == (1.5, 2.0)
    assert ideal.figures == pytest.approx((1.5, 1.5125))
    assert [p.verdict for p in (share, best)] == ["open (by the median NOT held)", "held"]
    assert [p.bound for p in of_server("RepVGG-A0", "binary", 64, [one])] == [0.9, 1.5]
    assert not list(of_server("RepVGG-A0", "binary", 1, [one]))
    assert not list(of_server("RepVGG-A0", "jpeg", 8, [one]))
    assert not list(of_server("RepVGG-A0", "binary", 8, []))


def test_contention_asks_for_more() -> None:
    speedups = {"float32": (2.9, 3.1, 3.2), "bfloat16": (3.0, 3.1, 3.2), "int8": (4.0, 4.1, 4.2)}
    alone = [p.verdict for p in of_shares(speedups, 8, contended=False)]
    contended = [p.verdict for p in of_shares(speedups, 8, contended=True)]
    assert alone == ["held", "held", "held"]
    assert contended == ["open (by the median held)", "NOT held"]


def test_where_nothing_was_promised_nothing_is_said() -> None:
    assert not list(lines([]))
