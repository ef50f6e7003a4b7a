"""At four times its capacity the service does as much as ever and says no quickly.

The fast form asks for what no machine misses by being busy; the long form asks for the promise.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.load import subjects
from tests.load.conftest import SETTINGS
from tests.load.offer import Outcome, offer, quantile
from tests.promises import Tell
from tests.running import RunningServer, running

MIB = 2**20


@dataclass(frozen=True)
class Promise:
    """Least goodput as a share of the peak; most median of refusals, p99 of health, growth."""

    goodput: float
    refusal_seconds: float
    health_seconds: float
    growth_bytes: float


FAST = Promise(0.25, 0.25, 2.0, 40 * MIB)
LONG = Promise(0.9, 0.010, 0.100, 8 * MIB)


def broken(promise: Promise, peak: Outcome, under: Outcome, growth: float) -> list[str]:
    """Which parts of the promise an overload broke."""
    faults = []
    if under.rate < promise.goodput * peak.rate:
        faults.append(f"goodput {under.rate:.0f} of {peak.rate:.0f} a second")
    if not under.refused:
        faults.append("nothing was refused")
    elif quantile(under.refused, 0.5) > promise.refusal_seconds:
        faults.append(f"a refusal takes {quantile(under.refused, 0.5):.3f} s")
    if under.odd:
        faults.append(f"{under.odd} refusals without Retry-After or the code")
    if set(under.statuses) - {"200", "429"}:
        faults.append(f"other answers: {under.statuses}")
    if quantile(under.health, 0.99) > promise.health_seconds:
        faults.append(f"health takes {quantile(under.health, 0.99):.3f} s")
    if growth > promise.growth_bytes:
        faults.append(f"memory grew by {growth / MIB:.1f} MiB")
    return faults


@contextmanager
def memory_of(server: RunningServer) -> Iterator[list[float]]:
    """Samples of the resident memory while this is open, ten a second."""
    samples: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            samples.append(server.resident_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def overload(
    server: RunningServer, seconds: float, model: str = "busy"
) -> tuple[Outcome, Outcome, float]:
    """The peak, four times as much, and how far memory rose from its first third to its last."""
    request = subjects.post(
        f"/v1/models/{model}/predict",
        subjects.busy_body(),
        "application/x-npy",
        "application/x-npy",
    )
    peak = offer(server.url, request, seconds=min(10.0, seconds / 2), connections=8)
    with memory_of(server) as samples:
        under = offer(server.url, request, seconds=seconds, rate=4 * peak.rate, connections=300)
    third = len(samples) // 3
    growth = statistics.median(samples[-third:]) - statistics.median(samples[:third])
    return peak, under, growth


def words(peak: Outcome, under: Outcome, growth: float) -> str:
    return (
        f"goodput {under.rate / peak.rate:.0%} of {peak.rate:.0f}/s, {under.statuses}, "
        f"refusal median {1e3 * quantile(under.refused, 0.5):.1f} ms, "
        f"health p99 {1e3 * quantile(under.health, 0.99):.1f} ms, {growth / MIB:+.1f} MiB"
    )


def test_overload_is_shed(loaded: RunningServer) -> None:
    peak, under, growth = overload(loaded, 4.0)
    assert broken(FAST, peak, under, growth) == [], words(peak, under, growth)


@pytest.mark.soak(share=0.1)
def test_overload_is_shed_for_a_minute(loaded: RunningServer, tell: Tell) -> None:
    subjects.upload(loaded, "heavy", subjects.heavy_checkpoint(), subjects.BUSY_CONFIG)
    peak, under, growth = overload(loaded, 60.0, "heavy")
    measured = words(peak, under, growth)
    tell("4 x capacity, 60 s", "90 %, 10 ms, 100 ms, flat", measured, "endless queue, below")
    assert broken(LONG, peak, under, growth) == [], measured


@pytest.mark.soak(share=0.05)
def test_a_service_that_never_refuses_breaks_the_promise(tmp_path: Path, tell: Tell) -> None:
    """The control: with a queue of a million rows the same load piles up."""
    endless = SETTINGS | {"FOLDSERVE_QUEUE_ROWS": "1000000"}
    with running(tmp_path / "data", endless, fresh=True) as server:
        subjects.upload(server, "busy", subjects.busy_checkpoint(), subjects.BUSY_CONFIG)
        peak, under, growth = overload(server, 10.0)
    tell("4 x capacity, no limit", "must fail", words(peak, under, growth), "is the control")
    assert "nothing was refused" in broken(LONG, peak, under, growth)
    assert quantile(under.answered, 0.99) > 3 * quantile(peak.answered, 0.99)


KEPT = Outcome(4.0, 800, 95.0, {"200": 380, "429": 420}, 0, 0, [0.3] * 380, [0.002], [0.01] * 99)
IDLE = replace(KEPT, rate=100.0)


@pytest.mark.parametrize(
    ("changed", "growth", "fault"),
    [
        ({"rate": 89.0}, 0, "goodput"),
        ({"refused": []}, 0, "nothing was refused"),
        ({"refused": [0.02]}, 0, "a refusal takes"),
        ({"odd": 1}, 0, "without Retry-After"),
        ({"statuses": {"200": 1, "500": 1}}, 0, "other answers"),
        ({"statuses": {"0": 1}}, 0, "other answers"),
        ({"health": [0.2] * 99}, 0, "health"),
        ({"health": [0.01] * 97 + [float("inf")] * 2}, 0, "health"),
        ({}, 9 * MIB, "memory"),
    ],
)
def test_every_part_of_the_promise_can_be_broken(
    changed: dict[str, object], growth: float, fault: str
) -> None:
    assert broken(LONG, IDLE, KEPT, 0) == []
    (found,) = broken(LONG, IDLE, replace(KEPT, **changed), growth)
    assert fault in found
