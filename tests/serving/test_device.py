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
from service.serving import Device, available_cpus


@pytest.fixture
def device() -> Iterator[Device]:
    thread = Device("cpu", threads=1)
    yield thread
    thread.close()


def test_jobs_run_in_order_on_one_thread_with_its_number_of_cpu_threads(
    device: Device,
) -> None:
    seen: list[tuple[int, str]] = []
    for number in range(50):
        device.post(lambda number=number: seen.append((number, threading.current_thread().name)))

    async def scenario() -> int:
        return await device.call(torch.get_num_threads)

    assert asyncio.run(scenario()) == 1
    assert seen == [(number, "device cpu") for number in range(50)]


def test_results_and_errors_come_back_and_a_bad_job_is_survived(
    device: Device, caplog: pytest.LogCaptureFixture
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


def test_a_caller_that_left_does_not_disturb(device: Device) -> None:
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


def test_an_event_loop_that_is_gone_does_not_disturb(device: Device) -> None:
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
    device = Device("cpu", threads=1)
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
    device = Device("cpu", threads=1)
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
    device = Device("cpu", threads=1)

    def bad() -> None:
        raise ValueError("bad job")

    assert device.run_if_idle(bad)
    assert device.run_if_idle(lambda: None)
    device.close()


def test_jobs_beside_others_run_at_once_and_whole_ones_never_do() -> None:
    device = Device("cpu", threads=3)
    met, order = threading.Barrier(3), []
    running: set[str] = set()

    def beside(name: str) -> None:
        running.add(name)
        met.wait(5)  # or all three are not under way at once
        order.append(name)
        running.discard(name)

    def whole() -> None:
        order.append("whole" if not running else f"beside {running}")

    for number in range(2):
        for name in "abc":
            device.post(lambda name=f"{name}{number}": beside(name), beside=True)
        device.post(whole)
    device.close()
    assert not met.broken
    assert [sorted(order[at : at + 3]) for at in (0, 4)] == [["a0", "b0", "c0"], ["a1", "b1", "c1"]]
    assert order[3::4] == ["whole", "whole"], "each waited for those before and none overtook"


def test_no_more_run_beside_each_other_than_there_are_threads() -> None:
    device = Device("cpu", threads=2)
    running, most = 0, 0
    lock = threading.Lock()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    for _ in range(20):
        device.post(job, beside=True)
    device.close()
    assert most == 2
    assert not [t.name for t in threading.enumerate() if t.name.startswith("device cpu")]


def test_a_job_beside_others_has_the_device_to_itself_only_if_nothing_runs_or_waits() -> None:
    device = Device("cpu", threads=2)
    gate, told = threading.Event(), []

    def alone() -> None:
        with device.whole_if_free() as free:
            device.post(lambda: told.append("next"), beside=True)
            time.sleep(0.02)  # what was posted would run now if it could
            told.append(free)
        gate.wait(5)

    def with_another() -> None:
        with device.whole_if_free() as free:
            told.append(free)

    device.post(alone, beside=True)
    while "next" not in told:
        time.sleep(0.001)
    device.post(with_another, beside=True)
    while len(told) < 3:
        time.sleep(0.001)
    gate.set()
    device.close()
    assert told == [True, "next", False]
