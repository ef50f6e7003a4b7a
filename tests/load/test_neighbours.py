"""What one client or one conversion does must not be felt by the others."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from tests.api import tiny
from tests.load import subjects
from tests.load.conftest import SETTINGS
from tests.load.offer import Outcome, finish, offer, quantile, start
from tests.promises import Tell
from tests.running import RunningServer, running

JSON, NPY = "application/json", "application/x-npy"
PREDICT = "/v1/models/lookup/predict"


def poisoned(server: RunningServer, seconds: float, every: int) -> Outcome:
    """Many callers of one model; every so many requests one makes its whole batch fail."""
    good = subjects.post(PREDICT, subjects.lookup_body(3), JSON, NPY)
    bad = subjects.post(PREDICT, subjects.lookup_body(99), JSON, NPY)
    process = start(server.url, good, seconds=seconds, connections=16, other=bad, every=every)
    with torch.no_grad(), httpx.Client(base_url=server.url, timeout=60) as http:
        expected = {n: subjects.lookup()(torch.full((1, 4), n)).numpy() for n in range(16)}
        for n in list(range(16)) * 2:
            headers = {"Content-Type": JSON, "Accept": NPY}
            answer = http.post(PREDICT, content=subjects.lookup_body(n), headers=headers)
            assert answer.status_code == 200, answer.text
            np.testing.assert_allclose(tiny.from_npy(answer.content), expected[n], atol=1e-5)
    return finish(process)


def check_poison(outcome: Outcome) -> None:
    assert set(outcome.statuses) == {"200"}, outcome.statuses
    # The control: the poison is one, and somebody took it.
    assert set(outcome.others) == {"500"}, outcome.others


def test_a_poison_request_harms_no_neighbour(loaded: RunningServer) -> None:
    check_poison(poisoned(loaded, 1.5, 20))


@pytest.mark.soak(share=0.02)
def test_one_poison_request_in_a_hundred_harms_no_neighbour(
    loaded: RunningServer, tell: Tell
) -> None:
    outcome = poisoned(loaded, 20.0, 100)
    measured = f"{outcome.statuses}, poison {outcome.others}"
    tell("1 % poison, 16 callers, 20 s", "no neighbour fails", measured, "the poison gets 500")
    check_poison(outcome)


HOGS = 12


def paced(server: RunningServer, seconds: float) -> Outcome:
    """One row at a time, far below capacity."""
    request = subjects.post("/v1/models/busy/predict", subjects.busy_body(), NPY, NPY)
    return offer(server.url, request, seconds=seconds, rate=10.0, connections=20)


def during_conversions(server: RunningServer, model: str, seconds: float) -> tuple[Outcome, int]:
    """The same while checkpoints are converted one after the other, and how many were."""
    request = subjects.post("/v1/models/busy/predict", subjects.busy_body(), NPY, NPY)
    data = subjects.busy_checkpoint()
    process = start(server.url, request, seconds=seconds, rate=10.0, connections=20)
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        subjects.upload(server, model, data, subjects.BUSY_CONFIG)
        done += 1
    return finish(process), done


def test_predictions_go_on_during_a_conversion(loaded: RunningServer) -> None:
    idle = paced(loaded, 1.5)
    under, _ = during_conversions(loaded, "aside", 1.5)
    assert set(idle.statuses) == set(under.statuses) == {"200"}
    assert quantile(under.answered, 0.5) < 5 * quantile(idle.answered, 0.5) + 0.25


@pytest.mark.soak(share=0.12)
def test_a_conversion_does_not_starve_inference(tmp_path: Path, tell: Tell) -> None:
    # The service's own default; the other tests convert at normal priority, to be done in time.
    polite = SETTINGS | {"FOLDSERVE_CONVERSION_PRIORITY": "idle"}
    with running(tmp_path / "data", polite, fresh=True) as server:
        subjects.upload(server, "busy", subjects.busy_checkpoint(), subjects.BUSY_CONFIG)
        idle = paced(server, 20.0)
        under, conversions = during_conversions(server, "aside", 40.0)
        hogged = with_hogs(server, 10.0)
    p99 = [1e3 * quantile(each.answered, 0.99) for each in (idle, under, hogged)]
    tell(
        f"p99 during {conversions} conversions", "<= 2 x idle p99",
        f"{p99[1]:.1f} ms to {p99[0]:.1f} ms = {p99[1] / p99[0]:.2f} x",
        f"{HOGS} processes of normal priority: {p99[2] / p99[0]:.2f} x",
    )  # fmt: skip
    assert set(under.statuses) == {"200"}
    assert p99[1] <= 2 * p99[0]
    assert p99[2] > 2 * p99[0]


def with_hogs(server: RunningServer, seconds: float) -> Outcome:
    """The control: what processes that take the cores without being polite do."""
    busy = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(busy) for _ in range(HOGS)]
    try:
        return paced(server, seconds)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
