"""The batcher under many callers at once: in any interleaving everyone gets their own rows."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from service.errors import BackendFailed, DeadlineExceeded, QueueFull
from service.serving import Batcher, BatchLimits, Device

from .fakes import POISON, Doubler, is_own, rows

SECONDS = 60.0
ROOM = 40  # rows; a storm of 150 requests brings about 500


@pytest.fixture
def device() -> Iterator[Device]:
    thread = Device("cpu", threads=3)
    yield thread
    thread.close()


@dataclass(frozen=True)
class Plan:
    """What one caller does; drawn beforehand, so that it is the same whatever the machine does."""

    begins: float
    values: tuple[float, ...]
    poisoned: bool
    deadline_seconds: float
    leaves_after: float | None

    @property
    def calm(self) -> bool:
        """Whether nothing but a full queue may keep this caller from its answer."""
        return not self.poisoned and self.leaves_after is None and self.deadline_seconds == SECONDS

    @property
    def allowed(self) -> set[str]:
        """The honest outcomes, where there is room for everyone."""
        outcomes = {"failed" if self.poisoned else "answered"}
        if self.leaves_after is not None:
            outcomes.add("departed")
        if self.deadline_seconds < SECONDS:
            outcomes.add("deadline_exceeded")
        return outcomes


def plans(seed: int, requests: int) -> list[Plan]:
    """Random sizes, pauses, departures, deadlines and poison."""
    dice = random.Random(seed)
    counter = iter(range(1, 1_000_000))
    return [
        Plan(
            begins=dice.random() * 0.05,
            values=tuple(float(next(counter)) for _ in range(dice.choice([1, 1, 1, 2, 5, 13]))),
            poisoned=dice.random() < 0.05,
            deadline_seconds=0.002 if dice.random() < 0.1 else SECONDS,
            leaves_after=dice.random() * 0.01 if dice.random() < 0.2 else None,
        )
        for _ in range(requests)
    ]


async def _storm(
    fake: Doubler, device: Device, planned: list[Plan], limits: BatchLimits
) -> list[str]:
    """What happened to each caller."""
    batcher = Batcher(fake, device, limits)

    async def client(plan: Plan) -> str:
        await asyncio.sleep(plan.begins)
        sent = (*plan.values[:-1], POISON) if plan.poisoned else plan.values
        deadline = time.monotonic() + plan.deadline_seconds
        call = asyncio.create_task(batcher.submit(rows(*sent), deadline))
        if plan.leaves_after is not None:
            await asyncio.sleep(plan.leaves_after)
            call.cancel()
        try:
            result = await call
        except asyncio.CancelledError:
            return "departed"
        except BackendFailed:
            return "failed" if plan.poisoned else "blamed without fault"
        except (QueueFull, DeadlineExceeded) as error:
            return error.code()
        if plan.poisoned:
            return "poison answered"
        return "answered" if is_own(result, plan.values) else "wrong rows"

    outcomes = await asyncio.wait_for(asyncio.gather(*map(client, planned)), SECONDS)
    stats = batcher.stats()
    assert stats.waiting_rows == 0
    assert stats.answered + stats.failed + stats.rejected + stats.expired <= len(planned)
    assert stats.answered >= outcomes.count("answered")
    assert all(size <= fake.batch_sizes[-1] for size in stats.batch_rows)
    await batcher.close()
    assert batcher.stats().running_rows == 0
    return outcomes


def _wrong(planned: list[Plan], outcomes: list[str], also: frozenset[str] = frozenset()) -> object:
    """The callers whose outcome is not among those that their plan allows."""
    return [
        (plan, outcome)
        for plan, outcome in zip(planned, outcomes, strict=True)
        if outcome not in plan.allowed | also
    ]


@pytest.mark.parametrize(
    ("inline_seconds", "streams"),
    [(0.0, 0), (0.05, 0), (0.0, 3), (0.05, 3)],
    ids=["on its thread", "on the loop", "on three threads", "three, not the loop"],
)
@pytest.mark.parametrize("seed", range(4))
def test_where_there_is_room_every_calm_caller_is_answered_whatever_the_others_do(
    device: Device, seed: int, inline_seconds: float, streams: int
) -> None:
    planned = plans(seed, 150)
    room = sum(len(plan.values) for plan in planned)
    dice = random.Random(1000 + seed)
    fake = Doubler(largest=8, pause=lambda: dice.random() * 0.001, streams=streams, stream_rows=2)
    outcomes = asyncio.run(
        _storm(fake, device, planned, BatchLimits(room, SECONDS, inline_seconds))
    )
    assert not _wrong(planned, outcomes)
    calm = sum(plan.calm for plan in planned)
    assert outcomes.count("answered") >= calm > 80
    assert fake.alone
    assert fake.beside <= streams
    assert (fake.beside > 1) == (streams > 1)


@pytest.mark.parametrize("seed", range(4))
def test_where_there_is_not_the_others_are_refused_at_once(device: Device, seed: int) -> None:
    planned = plans(seed, 150)
    fake = Doubler(largest=8)
    fake.gate.clear()  # held up until everyone has come, so that the queue must overflow

    async def scenario() -> list[str]:
        asyncio.get_running_loop().call_later(0.15, fake.gate.set)
        return await _storm(fake, device, planned, BatchLimits(ROOM, SECONDS))

    outcomes = asyncio.run(scenario())
    assert not _wrong(planned, outcomes, also=frozenset({"queue_full"}))
    assert "queue_full" in outcomes
    assert "answered" in outcomes


@pytest.mark.soak(share=0.015)
def test_thousands_of_interleavings(device: Device) -> None:
    for seed in range(100, 200):
        planned = plans(seed, 400)
        dice = random.Random(1000 + seed)
        fake = Doubler(
            largest=1 + seed % 16,
            pause=lambda dice=dice: dice.random() * 0.001,
            streams=seed % 4,
            stream_rows=1 + seed % 3,
        )
        limits = BatchLimits(ROOM, SECONDS, inline_seconds=seed % 2 * 0.05)
        outcomes = asyncio.run(_storm(fake, device, planned, limits))
        assert not _wrong(planned, outcomes, also=frozenset({"queue_full"}))
        assert fake.alone


@pytest.mark.parametrize("streams", [0, 2])
def test_the_check_notices_rows_that_are_mixed_up(device: Device, streams: int) -> None:
    planned = plans(1, 150)
    fake = Doubler(largest=8, mix_rows=True, streams=streams, stream_rows=4)
    outcomes = asyncio.run(_storm(fake, device, planned, BatchLimits(1 << 20, SECONDS)))
    assert "wrong rows" in outcomes
    assert _wrong(planned, outcomes)
