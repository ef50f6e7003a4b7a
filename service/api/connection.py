"""One TCP connection, with the limits that uvicorn leaves open.

What a client can hold without sending a request is bounded in number, size and time: connections,
the bytes and the count of headers, the time that a head may take, a body that goes on after its
answer, and an answer that nobody reads. Bodies are watched where they are read (`bodies.chunks`).
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

from service.api import problems
from service.api.repetition import Repetition
from service.api.security_headers import SECURITY_HEADERS
from service.errors import FoldserveError, HeadTooLarge, RequestStalled
from service.settings import Settings

_DRAIN_SECONDS = 10.0
"""How long the rest of a body is thrown away after an early answer, so that it can be read."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Connections at once; bytes, number and seconds of a request's headers; slowest reading.

    Every `response_idle_seconds` a reader must have taken `bytes_per_second` times as much.
    """

    connections: int
    head_bytes: int
    headers: int
    head_seconds: float
    response_idle_seconds: float
    bytes_per_second: float

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """The six limits as the settings have them, `max_connections` to `min_bytes_per_second`."""
        return cls(
            settings.max_connections,
            settings.max_head_bytes,
            settings.max_headers,
            settings.head_seconds,
            settings.response_idle_seconds,
            settings.min_bytes_per_second,
        )


def limited(limits: ConnectionLimits, count: Callable[[int], int] = int) -> type[asyncio.Protocol]:
    """The protocol class that uvicorn makes one of for every connection.

    `count` is told how many connections this process holds whenever that changes, and answers how
    many there are in all its fellows.
    """
    return type("Connection", (Connection,), {"limits": limits, "count": staticmethod(count)})


class Connection(Repetition):
    """HTTP/1.1 with limits; see the module."""

    limits: ClassVar[ConnectionLimits]

    @staticmethod
    def count(connections: int) -> int:
        """See `limited`."""
        return connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._head_fields = 0
        self._unheard_bytes = 0
        """What came since the parser last told of a piece of a body, or of a message's end."""
        self._complaint: str | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._refused: FoldserveError | None = None

    # ---- connections --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first head, or refuse one connection more than the limit."""
        super().connection_made(transport)
        if self.count(len(self.connections)) > self.limits.connections:
            self._answer(
                problems.too_many_connections(self.limits.connections), {"Retry-After": "1"}
            )
            return
        self._head_timer = self.loop.call_later(self.limits.head_seconds, self._no_head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and tell `count` that there is one connection less."""
        for timer in (self._head_timer, self._drain_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self.count(len(self.connections))

    # ---- heads --------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, then bound what no callback of the parser sees: endless headers, idle clients."""
        if self.transport.is_closing():
            return
        if self.repeats(data):
            self._unheard_bytes = 0
            return
        self._unheard_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head:
            # Counted here too, twice at most: a header that never ends reaches no callback.
            self._head_bytes += len(data)
            if self._head_bytes > 2 * self.limits.head_bytes:
                self._refuse(self._too_large())
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self.limits.head_seconds, self._no_head)
        elif self._unheard_bytes > 2 * self.limits.head_bytes:
            # Behind a body's last piece: a trailer or a chunk's head that never ends.
            if self._idle:
                self.transport.abort()
            else:
                self._refuse(self._too_large())
        elif self._idle and self._idle_since is None:
            self._start_keep_alive()  # the rest of a body after its answer, or empty lines

    def on_message_begin(self) -> None:
        """A head begins: its bytes and fields are counted from zero."""
        super().on_message_begin()
        self._in_head, self._head_bytes, self._head_fields = True, 0, 0

    def on_url(self, url: bytes) -> None:
        """Count the bytes of a piece of the address. Raises HeadTooLarge, which ends the parser."""
        super().on_url(url)
        self._count(len(url), 0)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header with its separators. Raises HeadTooLarge, which ends the parser.

        Trailers are counted alone: behind a body nothing may change who asks, and for what.
        """
        if self._in_head:
            super().on_header(name, value)
        self._count(len(name) + len(value) + 4, 1)

    def on_headers_complete(self) -> None:
        """The head is whole: stop its clock before uvicorn starts the application."""
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        upgrade = self.parser.should_upgrade()
        if upgrade and self._announces_body():
            self._complaint = "A request that asks for another protocol can have no body here."
            raise ValueError(self._complaint)  # its parser would take the body for a request
        super().on_headers_complete()
        if upgrade:
            self.cycle.keep_alive = False  # whatever follows is not in this protocol

    def _announces_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in self.headers
        )

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._unheard_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when its parser gives up, also because a callback here raised."""
        if self._refused is not None:
            self._refuse(self._refused)
        else:
            self._answer(problems.malformed_request(self._complaint or msg), {})

    def _count(self, size: int, fields: int) -> None:
        self._head_bytes += size
        self._head_fields += fields
        if self._head_bytes > self.limits.head_bytes or self._head_fields > self.limits.headers:
            self._refused = self._too_large()
            raise self._refused  # ends the parser, and comes back through `send_400_response`

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"The head of a request has at most {self.limits.head_bytes} bytes and "
            f"{self.limits.headers} headers here."
        )

    def _no_head(self) -> None:
        self._head_timer = None
        if not self._in_head:
            self.transport.close()  # opened ahead of need, or forgotten
            return
        seconds = self.limits.head_seconds
        self._refuse(RequestStalled(f"The request's head did not end within {seconds:g} s."))

    # ---- answers ------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Watch that the answer is read, or limit how long the rest of the body may come."""
        super().on_response_complete()
        if self.transport.is_closing():
            # It closes once everything is sent, and somebody must read for that.
            self._watch_reader()
        elif self._idle and self.cycle.more_body:
            self._drain_timer = self.loop.call_later(_DRAIN_SECONDS, self.transport.abort)

    def on_message_complete(self) -> None:
        """The body is whole: nothing is left to throw away."""
        self._unheard_bytes = 0
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client takes less than is sent: from now on its pace is measured."""
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        """The client has caught up: its pace does not matter until the next pause."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection, at once if its last answer is still unread."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # the last answer was not even read
        else:
            super().timeout_keep_alive_handler()

    def _watch_reader(self) -> None:
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self.limits.response_idle_seconds, self._look_at_reader, self._unread()
            )

    def _look_at_reader(self, before: int) -> None:
        """Cut off a client that took too little since it was last looked at."""
        self._write_timer = None
        owed = max(1.0, self.limits.bytes_per_second * self.limits.response_idle_seconds)
        if before - self._unread() < min(owed, before):
            self.transport.abort()
        else:
            self._watch_reader()

    def _unread(self) -> int:
        """Bytes of answers that the client's machine has not acknowledged.

        The kernel holds megabytes of them and calls for more in large steps only, so what
        waits here says nothing about a slow client.
        """
        try:
            descriptor = self.transport.get_extra_info("socket").fileno()
            in_kernel = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0]
        except (OSError, AttributeError):
            in_kernel = 0
        return int(in_kernel) + self.transport.get_write_buffer_size()

    def _refuse(self, error: FoldserveError) -> None:
        self._answer(problems.document(error), {})

    def _answer(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """A problem without the application, and the end of the connection."""
        if self.transport.is_closing():
            return
        if not self._idle and self.cycle.response_started:
            self.transport.abort()  # in the middle of another answer
            return
        answer = problems.response(
            body, {**dict(SECURITY_HEADERS), **headers, "Connection": "close"}
        )
        status = HTTPStatus(answer.status_code)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
        fields = b"".join(b"%b: %b\r\n" % field for field in answer.raw_headers)
        self.transport.write(head + fields + b"\r\n" + bytes(answer.body))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._watch_reader()
