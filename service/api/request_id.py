"""The id of the request that is being served, for every line that is logged meanwhile."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Final

HEADER: Final = b"x-request-id"
CURRENT: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)


def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Processor for structlog: the id, if a request is being served, as `request_id`."""
    if (current := CURRENT.get()) is not None:
        event.setdefault("request_id", current)
    return event
