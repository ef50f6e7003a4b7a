"""Programs that run batches beside each other: whose rows, on which cores, in which order."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from service.errors import BackendFailed, NotLoaded
from service.serving import Batcher, Device, Result

from .fakes import POISON, Doubler, is_own, rows


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device("cpu", threads=2)
    yield made
    made.close()


class Held(Doubler):
    """Holds up every batch that has a row of these values, until they are let go."""

    def __init__(self, *values: float, streams: int = 2, stream_rows: int = 1) -> None:
        super().__init__(streams=streams, stream_rows=stream_rows)
        self.held = {value: threading.Event() for value in values}

    def _compute(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        for value in inputs[0][:, 0].tolist():
            if value in self.held:
                assert self.held[value].wait(10), "the test forgot to let it go"
        return super()._compute(inputs)


async def _submitted(
    batcher: Batcher, device: Device, *requests: torch.Tensor
) -> list[asyncio.Task[Result]]:
    """Calls that all wait when the device comes free."""
    gate = threading.Event()
    device.post(lambda: gate.wait(5))
    calls = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)
    gate.set()
    return calls


async def _until(condition: object) -> None:
    for _ in range(2000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came")


def test_few_rows_get_all_cores_together_and_more_are_shared_out(device: Device) -> None:
    fake = Doubler(streams=2, stream_rows=2)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        assert is_own(await batcher.submit(rows(1)), (1,))
        assert fake.beside == 0, "a lone row has the device to itself"
        fake.gate.clear()
        call = asyncio.create_task(batcher.submit(rows(*range(7))))
        await _until(lambda: fake.beside == 2)
        fake.gate.set()
        result = await call
        assert is_own(result, tuple(range(7)))
        assert result.timing.batches == 4
        await batcher.close()
        assert batcher.stats().batch_rows == {1: 2, 2: 3}
        assert batcher.stats().running_rows == 0

    asyncio.run(scenario())
    assert fake.alone


def test_parts_that_end_out_of_order_are_joined_in_order(device: Device) -> None:
    fake = Held(0)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        call, other = await _submitted(batcher, device, rows(0, 1, 2, 3), rows(4))
        await _until(lambda: batcher.stats().rows == 4)  # all but the first
        assert not call.done()
        assert is_own(await other, (4,))
        fake.held[0].set()
        assert is_own(await call, (0, 1, 2, 3))
        await batcher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("streams", [2, 0])
def test_a_stream_goes_on_while_another_computes(device: Device, streams: int) -> None:
    """Without streams, the control, everybody waits for the one that takes long."""
    fake = Held(0, streams=streams)

    async def scenario() -> int:
        batcher = Batcher(fake, device)
        slow, *quick = await _submitted(batcher, device, *map(rows, range(9)))
        done, _ = await asyncio.wait(quick, timeout=5 if streams else 0.1)
        fake.held[0].set()
        await asyncio.gather(slow, *quick)
        await batcher.close()
        return len(done)

    assert asyncio.run(scenario()) == (8 if streams else 0)


def test_another_model_waits_for_the_rows_that_were_there_before_it_and_no_longer(
    device: Device,
) -> None:
    """Rows that come later, however many, do not get in front of it."""
    fake, other = Held(0, 1), Doubler()

    async def scenario() -> None:
        batcher, second = Batcher(fake, device), Batcher(other, device)
        first = await _submitted(batcher, device, *map(rows, range(6)))
        await _until(lambda: batcher.stats().running_rows == 2)
        foreign = asyncio.create_task(second.submit(rows(50)))
        later = [asyncio.create_task(batcher.submit(rows(value))) for value in range(10, 30)]
        await asyncio.sleep(0)
        for event in fake.held.values():
            event.set()
        await asyncio.gather(foreign, *first)
        assert len(fake.runs) < 6 + 20, "it came before the last of those that came after it"
        await asyncio.gather(*later)
        await batcher.close()
        await second.close()

    asyncio.run(scenario())
    assert fake.alone
    assert other.alone


def test_poison_harms_its_own_request_only(device: Device) -> None:
    fake = Doubler(streams=2, stream_rows=2)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        sent = [rows(1), rows(2, POISON), rows(3), rows(4, 5), rows(6)]
        found = await asyncio.gather(*map(batcher.submit, sent), return_exceptions=True)
        assert isinstance(found[1], BackendFailed)
        for at, values in ((0, (1,)), (2, (3,)), (3, (4, 5)), (4, (6,))):
            assert is_own(found[at], values)  # type: ignore[arg-type]
        assert batcher.fault is None
        stats = batcher.stats()
        assert (stats.answered, stats.failed, stats.waiting_rows) == (4, 1, 0)
        await batcher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("drain", [True, False])
def test_closing_waits_for_every_stream(device: Device, drain: bool) -> None:
    fake = Held(0, 1)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        calls = await _submitted(batcher, device, *map(rows, range(4)))
        await _until(lambda: batcher.stats().running_rows == 2)
        closing = asyncio.create_task(batcher.close(drain=drain))
        await asyncio.sleep(0.01)
        assert not closing.done()
        fake.held[0].set()
        await asyncio.sleep(0.01)
        assert not closing.done(), "the other one still runs"
        fake.held[1].set()
        await closing
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [is_own(found[at], (at,)) for at in (0, 1)] == [True, True]  # type: ignore[arg-type]
        for at in (2, 3):
            kept = found[at]
            assert isinstance(kept, NotLoaded) if not drain else is_own(kept, (at,))  # type: ignore[arg-type]
        assert batcher.stats().running_rows == 0
        with pytest.raises(NotLoaded):
            await batcher.submit(rows(1))

    asyncio.run(scenario())
