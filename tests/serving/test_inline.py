"""Batches that are too quick to be worth waking a thread for: who runs on the loop, and who not."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from service.errors import BackendFailed, NotLoaded
from service.serving import Batcher, BatchLimits, Description, Device, Result

from .fakes import POISON, Doubler, is_own, rows

QUICK = BatchLimits(inline_seconds=5.0)  # whatever a busy machine makes of a run that does nothing
DEVICE = "device cpu"


@pytest.fixture
def device() -> Iterator[Device]:
    thread = Device("cpu", threads=1)
    yield thread
    thread.close()


class Located(Doubler):
    """Remembers the thread of every run; `about` changes what it says of itself."""

    def __init__(self, **about: object) -> None:
        super().__init__(largest=4)
        self.places: list[str] = []
        self.about = about

    def run(self, inputs):  # type: ignore[no-untyped-def]
        self.places.append("loop" if threading.current_thread().name == "MainThread" else DEVICE)
        return super().run(inputs)

    def describe(self) -> Description:
        return replace(super().describe(), **self.about)  # type: ignore[arg-type]


async def _known(device: Device, batcher: Batcher, *sizes: int) -> None:
    """Let the batcher learn how long batches of these sizes take; the device is idle then."""
    for size in sizes:
        await batcher.submit(rows(*range(size)))
    while not device.run_if_idle(lambda: None):
        await asyncio.sleep(0.001)


def test_a_lone_request_runs_on_the_loop_once_its_time_is_known(device: Device) -> None:
    fake = Located()

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1)
        for value in (1, 2):
            result = await batcher.submit(rows(value))
            assert is_own(result, (value,))
            assert result.timing.batch_rows == 1
        await batcher.submit(rows(3, 4))  # of this size nothing is known
        await batcher.close()
        stats = batcher.stats()
        assert (stats.requests, stats.answered, stats.batches) == (4, 4, 4)
        assert stats.running_rows == stats.waiting_rows == 0

    asyncio.run(scenario())
    assert fake.places == [DEVICE, "loop", "loop", DEVICE]


@pytest.mark.parametrize(
    ("limits", "about"),
    [
        (BatchLimits(), {}),
        (BatchLimits(inline_seconds=1e-9), {}),
        (QUICK, {"place": "cuda:0"}),
        (QUICK, {"threads": 2}),
    ],
    ids=["never", "too slow", "not on a CPU", "on several threads"],
)
def test_what_must_not_stays_on_the_device(
    device: Device, limits: BatchLimits, about: dict[str, object]
) -> None:
    fake = Located(**about)

    async def scenario() -> None:
        batcher = Batcher(fake, device, limits)
        await _known(device, batcher, 1, 1, 1)
        await batcher.close()

    asyncio.run(scenario())
    assert fake.places == [DEVICE] * 3


def test_who_comes_in_the_same_moment_shares_the_batch(device: Device) -> None:
    fake = Located()

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1, 4)
        results = await asyncio.gather(*(batcher.submit(rows(value)) for value in range(4)))
        assert all(is_own(result, (value,)) for value, result in enumerate(results))
        assert fake.runs[2:] == [[0, 1, 2, 3]]
        await batcher.close()

    asyncio.run(scenario())
    assert fake.places[2:] == ["loop"]


def test_a_busy_device_is_not_overtaken(device: Device) -> None:
    fake, other = Located(), threading.Event()

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1)
        device.post(other.wait)
        waiting = asyncio.create_task(batcher.submit(rows(5)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not waiting.done()
        assert batcher.stats().waiting_rows == 1
        other.set()
        assert is_own(await waiting, (5,))
        await batcher.close()

    asyncio.run(scenario())
    assert fake.places == [DEVICE, DEVICE]


def test_only_the_culprit_fails_there_too(device: Device) -> None:
    fake = Located()

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1, 3)
        asked = (batcher.submit(rows(value)) for value in (1.0, POISON, 2.0))
        good, bad, also_good = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(bad, BackendFailed)
        assert isinstance(good, Result)
        assert isinstance(also_good, Result)
        assert is_own(good, (1,))
        assert is_own(also_good, (2,))
        assert batcher.fault is None
        await batcher.close()

    asyncio.run(scenario())
    assert set(fake.places[2:]) == {"loop"}


def test_who_leaves_before_it_runs_does_not_compute(device: Device) -> None:
    fake = Located()

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1)
        leaving = asyncio.create_task(batcher.submit(rows(7)))
        await asyncio.sleep(0)  # it has entered the queue
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert is_own(await batcher.submit(rows(8)), (8,))
        stats = batcher.stats()
        assert (stats.departed, stats.waiting_rows) == (1, 0)
        await batcher.close()

    asyncio.run(scenario())
    assert [7] not in fake.runs


def test_closing_answers_who_came_just_before(device: Device) -> None:
    fake = Located()

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1)
        last = asyncio.create_task(batcher.submit(rows(9)))
        await asyncio.sleep(0)
        await batcher.close()
        assert is_own(await last, (9,))
        with pytest.raises(NotLoaded):
            await batcher.submit(rows(1))

    asyncio.run(scenario())


def test_a_closed_device_leaves_nobody_hanging() -> None:
    fake = Located()
    device = Device("cpu", threads=1)

    async def scenario() -> None:
        batcher = Batcher(fake, device, QUICK)
        await _known(device, batcher, 1)
        device.close()
        with pytest.raises(NotLoaded):
            await asyncio.wait_for(batcher.submit(rows(2)), 5)

    asyncio.run(scenario())
