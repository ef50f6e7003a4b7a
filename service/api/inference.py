"""From rows to a result: what every protocol's inference does once its request has been read."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from service.api import tracing
from service.api.complete import Complete
from service.api.departure import Departure
from service.api.state import Service
from service.errors import NotLoaded
from service.hosting import Hosted
from service.serving import Form, Result, Rows, Timing

T = TypeVar("T")

_PATIENCE_SECONDS = 0.05


async def find_hosted(
    service: Service, name: str, version: int | None, *, again: bool = False
) -> Hosted:
    """The version that answers, loaded if need be; `again` looks past what was found before.

    Raises ModelNotFound, VersionNotFound, VersionNotReady, NotServable, or what loading raises.
    """
    found = None if again else service.host.hosted(name, version)
    if found is None:
        number = await service.host.ensure(name, version)
        found = service.host.hosted(name, number)
    if found is None:
        raise NotLoaded(f"Model {name!r} was unloaded meanwhile.")
    return found


async def compute(
    service: Service, on: Hosted, version: int | None, rows: Rows, form: Form
) -> tuple[Hosted, Result]:
    """The outputs for `rows`, and the version that gave them: `on`, or its successor.

    `version` is what the caller asked for. A version may be unloaded between the look and the
    call, by a switch or for idleness: then it is looked for once more.
    """
    try:
        result = await on.predict(rows, form)
    except NotLoaded:
        on = await find_hosted(service, on.model, version, again=True)
        result = await on.predict(rows, form)
    tracing.predicted(result.timing)
    return on, result


def unless_departed(request: Request, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """The result of `work`; if the client leaves first, `work` is cancelled and gives up its place.

    Raises ClientDisconnect then. The connection tells of a complete request's departure. For
    another one it is watched for, which costs a task and so begins only when the answer is slow.
    """
    if isinstance(request, Complete):
        return _waited_for(work, request.departure)
    return _watched(request, work)


async def _watched(request: Request, work: Coroutine[Any, Any, T]) -> T:
    departure = Departure()
    watch = _DepartureWatch(request, departure)
    timer = asyncio.get_running_loop().call_later(_PATIENCE_SECONDS, watch.begin)
    try:
        return await _waited_for(work, departure)
    finally:
        timer.cancel()
        watch.end()


async def _waited_for(work: Coroutine[Any, Any, T], departure: Departure) -> T:
    if departure.told:
        work.close()
    with departure:
        return await work


class _DepartureWatch:
    """Tells of a client that leaves, from `begin` to `end`."""

    __slots__ = ("_departure", "_receive", "_watching")

    def __init__(self, request: Request, departure: Departure) -> None:
        self._departure = departure
        self._receive = request.receive
        self._watching: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._watching = asyncio.ensure_future(self._wait())

    def end(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._departure.tell()


def server_timing(timing: Timing) -> str:
    """The value of a `Server-Timing` header; durations in milliseconds, the batch's rows beside."""
    return (
        f"queue;dur={timing.queue_seconds * 1e3:.3f}, "
        f"compute;dur={timing.compute_seconds * 1e3:.3f}, "
        f'batch;desc="{timing.batch_rows} rows"'
    )
