"""Answers that are whole when they are sent: one write for head and body.

uvicorn writes the head when it is told of it. The body then is another system call, another packet,
and another time that the client is woken up. ASGI lets a server wait with the head until the first
piece of the body; here that is done where a length was declared, so that streams begin at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

from service.api.request_id import HEADER as REQUEST_ID

_MOST_COPIED_BYTES = 1 << 16
_UNUSUAL = frozenset({b"connection", b"transfer-encoding"})
_KNOWN_LINES = 1024  # headers that are remembered in the form in which they are sent


def answering_whole(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """`app` for the one request of `cycle`, with its answer written at once if it is whole."""

    async def serve(scope: Scope, receive: Receive, _send: Send) -> None:
        answer = _Answer(cycle)
        try:
            await app(scope, receive, answer.send)
        except BaseException:  # what was begun is cut off, and not taken back
            await answer.begin()
            raise

    return serve


class _Answer:
    """Keeps the head of an answer until its body comes."""

    __slots__ = ("_cycle", "_start")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._start: Message | None = None

    async def send(self, message: Message) -> None:
        start, self._start = self._start, None
        if start is None and message["type"] == "http.response.start":
            if any(name == b"content-length" for name, _ in message["headers"]):
                self._start = message
                return
        elif start is not None and _is_all(message):
            body = message.get("body", b"")
            if write(self._cycle, start["status"], start["headers"], body):
                return
        if start is not None:
            await self._pass_on(start)
        await self._pass_on(message)

    async def begin(self) -> None:
        """Send the head that waits for its body, if there is one."""
        start, self._start = self._start, None
        if start is not None:
            await self._pass_on(start)

    async def _pass_on(self, message: Message) -> None:
        send: Any = self._cycle.send
        await send(message)


def _is_all(message: Message) -> bool:
    """Whether the message is all of a body."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def write(
    cycle: RequestResponseCycle,
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes | memoryview,
) -> bool:
    """Send a whole answer in one piece, if it can be sent now and needs no judgement of uvicorn's.

    False where it was left alone. Afterwards the connection is as uvicorn leaves it at the end of
    an answer after which it stays open.
    """
    made = lines(headers, body)
    return made is not None and write_lines(cycle, status, made, body)


def write_lines(
    cycle: RequestResponseCycle, status: int, made: bytes, body: bytes | memoryview
) -> bool:
    """`write`, with the headers' `lines`."""
    if (
        not cycle.keep_alive
        or cycle.response_started
        or cycle.disconnected
        or cycle.flow.write_paused
        or cycle.scope["method"] == "HEAD"
    ):
        return False
    always = lines(cycle.default_headers, b"")
    if always is None:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(b"".join((STATUS_LINE[status], always, made, b"\r\n", body)))
    cycle.message_event.set()
    cycle.on_response()
    return True


def lines(headers: Iterable[tuple[bytes, bytes]], body: bytes | memoryview) -> bytes | None:
    """The headers of an answer with that body as they are sent; None where uvicorn has to judge."""
    if len(body) > _MOST_COPIED_BYTES:
        return None
    made = []
    for header in headers:
        line = _made(header) if header[0] == REQUEST_ID else _line(header)
        if line is None or (header[0] == b"content-length" and header[1] != b"%d" % len(body)):
            return None
        made.append(line)
    return b"".join(made)


def _made(header: tuple[bytes, bytes]) -> bytes | None:
    """A header as it is sent; None for one that uvicorn has to judge."""
    name, value = header
    if name in _UNUSUAL or HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
        return None
    return b"%b: %b\r\n" % header


_line = lru_cache(_KNOWN_LINES)(_made)
"""`_made`, remembered; ids would drive out what is worth it."""
