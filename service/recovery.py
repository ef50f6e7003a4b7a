"""Models whose device or backend fails: taken out of serving, and loaded again until they work.

A program is out of order when it cannot even run rows of the service's own (see the batcher). It
then answers 503, its memory is given back, and it is loaded anew at growing intervals. The other
models go on. Readiness is off meanwhile, for a limited number of attempts: one model that cannot be
cured must not keep a service with others out of traffic for ever. On a device that is lost nothing
is mended: readiness stays off until the process is another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog

from service.errors import DeviceLost, ModelFaulty

log = structlog.get_logger(__name__)

Key = tuple[str, int]


@dataclass
class Fault:
    """A version that is out of order: why, since when, and how often it was loaded again.

    `for_good`: loading it again is pointless, because its device is lost.
    """

    detail: str
    since: float
    for_good: bool = False
    attempts: int = 0
    next_attempt: float = 0.0


class Recovery:
    """The faults of one service's models. Used on its event loop."""

    def __init__(
        self,
        found: Callable[[], dict[Key, Exception]],
        reload: Callable[[Key], Awaitable[None]],
        *,
        check_seconds: float,
        attempts: int,
        longest_wait: float,
    ) -> None:
        """`found` tells which versions are out of order now; `reload` unloads and loads one."""
        self._found, self._reload = found, reload
        self._check_seconds, self._attempts = check_seconds, attempts
        self._longest_wait = longest_wait
        self.faults: dict[Key, Fault] = {}
        self.seen = 0
        self.recovered = 0

    @property
    def under_way(self) -> bool:
        """Whether a model is out of order that the service has not given up yet."""
        return any(f.for_good or f.attempts < self._attempts for f in self.faults.values())

    def check(self, key: Key) -> None:
        """Raises ModelFaulty when a version is out of order."""
        if (fault := self.faults.get(key)) is not None:
            wait = max(1.0, fault.next_attempt - time.monotonic())
            raise ModelFaulty(fault.detail, retry_after=round(wait, 3))

    def forget(self, model: str, version: int | None) -> None:
        """A version, or a whole model, is not served any more."""
        for key in [k for k in self.faults if k[0] == model and version in (None, k[1])]:
            del self.faults[key]

    def to_list(self) -> list[dict[str, Any]]:
        """The faults in a JSON-able form."""
        now = time.monotonic()
        return [
            {
                "model": model,
                "version": version,
                "detail": fault.detail,
                "seconds": round(now - fault.since, 3),
                "attempts": fault.attempts,
            }
            for (model, version), fault in sorted(self.faults.items())
        ]

    async def run(self) -> None:
        """Look for faults and mend them, for ever."""
        while True:
            await asyncio.sleep(self._check_seconds)
            self.note()
            for key, fault in list(self.faults.items()):
                if fault.for_good:
                    continue
                if time.monotonic() >= fault.next_attempt and key in self.faults:
                    await self._mend(key, fault)

    def note(self) -> None:
        """Take note of what is out of order now."""
        for key, error in self._found().items():
            if key not in self.faults:
                self.seen += 1
                detail, for_good = f"{type(error).__name__}: {error}", isinstance(error, DeviceLost)
                self.faults[key] = Fault(detail, time.monotonic(), for_good)
                log.error("model_faulty", model=key[0], version=key[1], detail=str(error))

    async def _mend(self, key: Key, fault: Fault) -> None:
        try:
            await self._reload(key)
        except Exception as error:
            fault.attempts += 1
            fault.detail = f"{type(error).__name__}: {error}"
            wait = min(self._longest_wait, self._check_seconds * 2**fault.attempts)
            fault.next_attempt = time.monotonic() + wait
            log.warning("reload_failed", model=key[0], version=key[1], detail=fault.detail)
        else:
            self.faults.pop(key, None)
            self.recovered += 1
            log.info("model_recovered", model=key[0], version=key[1])
