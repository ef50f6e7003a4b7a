"""A version's progress as server-sent events, resumable and finite."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import StreamingResponse

from service import errors
from service.api.documented import refusals
from service.api.encoding import json_bytes
from service.api.models import VersionNumber
from service.api.state import Here, Service, in_thread
from service.api.uploads import ModelName
from service.errors import BadInput, StoreError
from service.store import EventRecord, State

router = APIRouter(tags=["versions"])

_BATCH = 100
_EXAMPLE = (
    'id: 3\nevent: progress\ndata: {"stage":"certify","done":7,"total":22}\n\n'
    'id: 9\nevent: state\ndata: {"state":"ready"}\n\n'
)


@router.get(
    "/v1/models/{name}/versions/{version}/events",
    summary="Follow a conversion",
    response_class=StreamingResponse,
    responses=refusals(
        errors.ModelNotFound,
        errors.VersionNotFound,
        errors.NameInvalid,
        errors.BadInput,
        also={
            200: {
                "description": "`state` and `progress` events until `ready` or `rejected`.",
                "content": {"text/event-stream": {"example": _EXAMPLE}},
            }
        },
    ),
)
async def events(
    name: ModelName,
    version: VersionNumber,
    service: Here,
    last_event_id: Annotated[
        str | None, Header(description="Resume after this event.", examples=["3"])
    ] = None,
) -> StreamingResponse:
    """All events so far, then new ones as they happen; the stream ends with the final state."""
    after = _number(last_event_id)
    await in_thread(service.catalog.get_version, name, version)
    return StreamingResponse(
        _stream(service, name, version, after),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(service: Service, name: str, version: int, after: int) -> AsyncIterator[bytes]:
    settings = service.settings
    spoken = time.monotonic()
    while True:
        try:
            # The state is read first: what had happened by then is among the events read next.
            record = await in_thread(service.catalog.get_version, name, version)
            fresh = await in_thread(service.catalog.events, name, version, after, _BATCH)
        except StoreError:  # deleted meanwhile
            return
        for event in fresh:
            after = event.number
            yield _encode(event)
        if fresh:
            spoken = time.monotonic()
        elif record.state.final or service.draining:
            return
        elif time.monotonic() - spoken >= settings.events_heartbeat_seconds:
            yield b": still there\n\n"
            spoken = time.monotonic()
        if len(fresh) < _BATCH and not (fresh and _is_final(fresh[-1])):
            await asyncio.sleep(settings.events_poll_seconds)


def _encode(event: EventRecord) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (
        event.number,
        event.kind.encode(),
        json_bytes(event.data),
    )


def _is_final(event: EventRecord) -> bool:
    return event.kind == "state" and event.data.get("state") in (State.READY, State.REJECTED)


def _number(text: str | None) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise BadInput(
            f"{text[:40]!r} is no event number.", remedy="Send the id of the last event received."
        )
    return int(text)
