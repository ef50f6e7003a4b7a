"""A token bucket per caller, in memory and bounded."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from service.errors import RateLimited

_MOST_CALLERS = 10_000


class RateLimit:
    """`rate` requests a second for each caller, and `burst` beyond that at once.

    A caller who was forgotten begins with a full bucket, as one who waited would have it.
    """

    def __init__(
        self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count one request of `caller`. Raises RateLimited with `retry_after` in seconds."""
        now = self._clock()
        tokens, at = self._buckets.pop(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - at) * self._rate)
        refused = tokens < 1
        self._buckets[caller] = (tokens if refused else tokens - 1, now)
        if len(self._buckets) > _MOST_CALLERS:
            self._buckets.popitem(last=False)
        if refused:
            raise RateLimited(
                f"More than {self._rate:g} requests a second came on the whole.",
                retry_after=round((1 - tokens) / self._rate, 3),
            )
