"""The device thread: order, results, errors, its end; and how many CPUs there are."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.errors import NotLoaded
from service.serving import DeviceThread, available_cpus


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread("cpu", threads=1)
    yield thread
    thread.close()


def test_jobs_run_in_order_on_one_thread_with_its_number_of_cpu_threads(
    device: DeviceThread,
) -> None:
    seen: list[tuple[int, str]] = []
    for number in range(50):
        device.post(lambda number=number: seen.append((number, threading.current_thread().name)))

    async def scenario() -> int:
        return await device.call(torch.get_num_threads)

    assert asyncio.run(scenario()) == 1
    assert seen == [(number, "device cpu") for number in range(50)]


def test_results_and_errors_come_back_and_a_bad_job_is_survived(
    device: DeviceThread, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ValueError("no")

    async def scenario() -> None:
        assert await device.call(lambda: 3) == 3
        with pytest.raises(ValueError, match="no"):
            await device.call(fail)
        device.post(fail)
        assert await device.call(lambda: 4) == 4

    asyncio.run(scenario())
    assert "a job on device cpu raised" in caplog.text


def test_a_caller_that_left_does_not_disturb(device: DeviceThread) -> None:
    gate = threading.Event()

    async def scenario() -> None:
        waiting = asyncio.create_task(device.call(lambda: gate.wait(5)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        gate.set()
        assert await device.call(lambda: 5) == 5
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


def test_an_event_loop_that_is_gone_does_not_disturb(device: DeviceThread) -> None:
    gate = threading.Event()

    async def abandon() -> None:
        task = asyncio.create_task(device.call(lambda: gate.wait(5)))
        await asyncio.sleep(0.01)
        task.cancel()

    async def after() -> int:
        return await device.call(lambda: 6)

    asyncio.run(abandon())
    gate.set()
    assert asyncio.run(after()) == 6


def test_closing_finishes_what_was_posted_and_takes_no_more() -> None:
    device = DeviceThread("cpu", threads=1)
    done: list[int] = []
    for number in range(20):
        device.post(lambda number=number: done.append(number))
    device.close()
    device.close()
    assert done == list(range(20))
    with pytest.raises(NotLoaded):
        device.post(lambda: None)
    assert "device cpu" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("rubbish", 8), (None, 8)],
)
def test_available_cpus_are_affinity_bounded_by_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: str | None, expected: int
) -> None:
    def read_text(path: Path) -> str:
        if quota is None:
            raise FileNotFoundError(path)
        return quota

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_cpus() == expected


def test_an_idle_device_lends_its_turn_and_a_busy_one_does_not() -> None:
    device = DeviceThread("cpu", threads=1)
    gate, done = threading.Event(), threading.Event()
    seen: list[str] = []

    def mine() -> None:
        seen.append("mine")
        device.post(lambda: seen.append("posted meanwhile"))
        assert not device.run_if_idle(lambda: seen.append("within"))
        time.sleep(0.02)  # what was posted would run now if it could

    assert device.run_if_idle(mine)
    assert seen[0] == "mine"
    device.post(done.set)
    assert done.wait(5)
    assert seen == ["mine", "posted meanwhile"]
    device.post(gate.wait)
    assert not device.run_if_idle(lambda: seen.append("overtook"))
    gate.set()
    device.close()
    assert not device.run_if_idle(lambda: seen.append("after the end"))
    assert len(seen) == 2


def test_what_raises_in_a_lent_turn_is_logged_and_the_device_goes_on() -> None:
    device = DeviceThread("cpu", threads=1)

    def bad() -> None:
        raise ValueError("bad job")

    assert device.run_if_idle(bad)
    assert device.run_if_idle(lambda: None)
    device.close()
