"""The API keys as a running service knows them: a copy of the catalog's, read again in a rhythm.

A request costs a hash and a comparison, and never the database. A key that was created or revoked
beside the running service counts from the next reading on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from service.errors import FoldserveError, Unauthorized
from service.store import KeyRecord, key_id

log = structlog.get_logger(__name__)


class Keyring:
    """Known keys by id, at most `refresh_seconds` old; there are none before `start`."""

    def __init__(self, refresh_seconds: float) -> None:
        self._seconds = refresh_seconds
        self._known: dict[str, KeyRecord] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self, read: Callable[[], tuple[KeyRecord, ...]]) -> None:
        """Read the keys, and from now on again and again; `read` may block."""
        await self._refresh(read)
        self._task = asyncio.create_task(self._refresh_forever(read))

    async def close(self) -> None:
        """Read no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def identify(self, presented: str) -> KeyRecord:
        """The record of a presented key. Raises Unauthorized, which repeats nothing of it."""
        identity = key_id(presented)
        record = None if identity is None else self._known.get(identity)
        if record is None or not record.matches(presented):
            raise Unauthorized("The API key is not valid.")
        if not record.usable(datetime.now(UTC)):
            raise Unauthorized("The API key was revoked or has expired.")
        return record

    async def _refresh(self, read: Callable[[], tuple[KeyRecord, ...]]) -> None:
        self._known = {record.id: record for record in await asyncio.to_thread(read)}

    async def _refresh_forever(self, read: Callable[[], tuple[KeyRecord, ...]]) -> None:
        while True:
            # Twice in the promised time: a key may be made just after one reading began.
            await asyncio.sleep(self._seconds / 2)
            try:
                await self._refresh(read)
            except FoldserveError as error:
                # The last known keys stay: a database that is away must not stop predictions.
                log.warning("keys_not_read", detail=error.detail)
