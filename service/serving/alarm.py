"""One timer for all deadlines; one for each request would nearly always be for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.serving.request import monotonic


class Alarm:
    """Calls back when the earliest of many deadlines has passed, on an event loop that set it.

    Deadlines are not taken back: whoever is called looks who still waits, and answers the earliest
    deadline that is left, or None.
    """

    def __init__(self, ring: Callable[[], float | None]) -> None:
        self._ring = ring
        self._timers: dict[asyncio.AbstractEventLoop, tuple[float, asyncio.TimerHandle]] = {}

    def set(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        """Ring no later than at `deadline`, a `time.monotonic` moment; called on `loop`."""
        if (timer := self._timers.get(loop)) is not None:
            if timer[0] <= deadline:
                return
            timer[1].cancel()
        self._timers[loop] = deadline, loop.call_later(deadline - monotonic(), self._due, loop)

    def clear(self) -> None:
        """Ring no more; called on the loop that set it."""
        for _, timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        del self._timers[loop]
        if (following := self._ring()) is not None:
            self.set(loop, following)
