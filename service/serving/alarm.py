"""One timer for all deadlines; one for each request would nearly always be for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.serving.device import hand_over
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
        else:
            for other in list(self._timers):  # other loops may be at it too
                if other.is_closed():
                    self._timers.pop(other, None)
        self._timers[loop] = deadline, loop.call_later(deadline - monotonic(), self._due, loop)

    def clear(self) -> None:
        """Ring no more, on any loop; called on one of them."""
        here = asyncio.get_running_loop()
        timers, self._timers = self._timers, {}
        for loop, (_, timer) in timers.items():
            if loop is here:
                timer.cancel()
            else:
                hand_over(loop, timer.cancel)

    def _due(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timers.pop(loop, None)
        if (following := self._ring()) is not None:
            self.set(loop, following)
