"""The timer that all requests of a batcher share."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

from service.serving.alarm import Alarm


class Waiters:
    """Deadlines that are still waited for, and when it rang."""

    def __init__(self) -> None:
        self.deadlines: list[float] = []
        self.rung: list[float] = []
        self.alarm = Alarm(self.ring)

    def ring(self) -> float | None:
        now = time.monotonic()
        self.rung.append(now)
        self.deadlines = [deadline for deadline in self.deadlines if deadline > now]
        return min(self.deadlines, default=None)

    def wait(self, seconds: float) -> None:
        self.deadlines.append(time.monotonic() + seconds)
        self.alarm.set(asyncio.get_running_loop(), self.deadlines[-1])


def test_each_deadline_is_met_whatever_order_they_come_in() -> None:
    waiters = Waiters()

    async def scenario() -> None:
        for seconds in (0.06, 0.02, 0.04):
            waiters.wait(seconds)
        wanted = sorted(waiters.deadlines)
        while waiters.deadlines:
            await asyncio.sleep(0.01)
        # One ring may have met several deadlines, and none may have come before its own.
        assert 1 <= len(waiters.rung) <= 3
        assert waiters.rung[0] >= wanted[0]
        assert waiters.rung[-1] >= wanted[-1]

    asyncio.run(scenario())


def test_one_timer_serves_any_number_of_requests_that_are_answered_in_time() -> None:
    waiters = Waiters()

    async def scenario() -> None:
        for _ in range(100):
            waiters.wait(0.02)
        waiters.deadlines.clear()  # all answered
        await asyncio.sleep(0.06)
        assert len(waiters.rung) == 1
        waiters.wait(0.01)  # and it is set anew afterwards
        await asyncio.sleep(0.04)
        assert len(waiters.rung) == 2

    asyncio.run(scenario())


def test_every_loop_has_a_timer_of_its_own_even_after_another_has_closed() -> None:
    waiters = Waiters()

    async def leave_one_behind() -> None:
        waiters.wait(0.01)

    async def scenario() -> None:
        waiters.wait(0.02)
        await asyncio.sleep(0.05)
        assert not waiters.deadlines

    asyncio.run(leave_one_behind())
    asyncio.run(scenario())


def test_a_cleared_alarm_holds_nothing() -> None:
    async def scenario() -> None:
        waiters = Waiters()
        gone = weakref.ref(waiters)
        waiters.wait(60)
        waiters.alarm.clear()
        del waiters
        gc.collect()
        assert gone() is None

    asyncio.run(scenario())
