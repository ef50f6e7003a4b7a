"""Answers that are whole when they are sent: one write for head and body.

uvicorn writes the head when it is told of it. The body then is another system call, another packet,
and another time that the client is woken up. ASGI lets a server wait with the head until the first
piece of the body; here that is done where a length was declared, so that streams begin at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    HEADER_RE,
    HEADER_VALUE_RE,
    STATUS_LINE,
    RequestResponseCycle,
)

from service.api.middleware import security_headers

_MOST_COPIED_BYTES = 1 << 16
_UNUSUAL = frozenset({b"connection", b"transfer-encoding"})
_KNOWN_LINES = {
    (name.encode(), value.encode()): f"{name}: {value}\r\n".encode()
    for name, value in security_headers().items()
}


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
        elif start is not None and self._is_whole(message):
            body = message.get("body", b"")
            head = _head(start["status"], self._cycle.default_headers, start["headers"], len(body))
            if head is not None:
                self._finish(b"".join((*head, body)))
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

    def _is_whole(self, message: Message) -> bool:
        """Whether the message is all of a body and can be written now."""
        cycle = self._cycle
        return (
            message["type"] == "http.response.body"
            and not message.get("more_body", False)
            and len(message.get("body", b"")) <= _MOST_COPIED_BYTES
            and not (cycle.response_started or cycle.disconnected or cycle.flow.write_paused)
            and cycle.keep_alive
            and cycle.scope["method"] != "HEAD"
        )

    def _finish(self, answer: bytes) -> None:
        """What uvicorn does at the end of an answer after which the connection stays open."""
        cycle = self._cycle
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(answer)
        cycle.message_event.set()
        cycle.on_response()


def _head(
    status: int,
    defaults: Iterable[tuple[bytes, bytes]],
    headers: Iterable[tuple[bytes, bytes]],
    length: int,
) -> list[bytes] | None:
    """The lines of a head for a body of that length; None for what uvicorn has to judge."""
    lines = [STATUS_LINE[status]]
    lines += [b"%b: %b\r\n" % pair for pair in defaults]
    for pair in headers:
        line = _KNOWN_LINES.get(pair)
        if line is None:
            name, value = pair
            if name in _UNUSUAL or HEADER_RE.search(name) or HEADER_VALUE_RE.search(value):
                return None
            if name == b"content-length" and value != b"%d" % length:
                return None
            line = b"%b: %b\r\n" % pair
        lines.append(line)
    lines.append(b"\r\n")
    return lines
