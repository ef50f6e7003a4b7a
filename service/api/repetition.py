"""Requests that begin, byte for byte, as the one before on their connection did.

A client that asks for one prediction after the other sends the same head each time; only the body
differs. What a parser makes of a head depends on nothing but its bytes, and where a body ends is
said there, so neither has to be found out again. HTTP/2 saves heads in a like way (RFC 7541), but
there the client has to do something for it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple, Self

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.api.complete import BEGAN, Complete, Head
from service.api.exchange import HOLD_SECONDS, Exchange

_LONGEST_HEAD = 1 << 12  # bytes; every connection remembers one
_END = b"\r\n\r\n"


class Before(NamedTuple):
    """A request to compare the next with: its head in bytes, what they say, its body's length."""

    bytes_: bytes
    length: int
    scope: dict[str, Any]
    head: Head

    @classmethod
    def of(cls, data: bytes, request: Complete) -> Self | None:
        """What to remember of a request that was all of `data`; None if that says too little.

        To be called before the application has seen the request, which changes its scope.
        """
        length = len(request.content)
        begin = len(data) - length
        fields = request.head.fields
        if (
            begin > _LONGEST_HEAD
            or b"transfer-encoding" in fields
            or fields.get(b"content-length") != b"%d" % length
            or data.find(_END) + len(_END) != begin  # more than head and body came
        ):
            return None
        return cls(data[:begin], length, dict(request.scope), request.head)

    def body_of(self, data: bytes) -> bytearray | None:
        """The body, in a buffer of its own, if `data` is one request with the same head."""
        if len(data) != len(self.bytes_) + self.length or not data.startswith(self.bytes_):
            return None
        return bytearray(memoryview(data)[len(self.bytes_) :])


class Repetition(Exchange):
    """Exchanges of which the parser sees only what is new; see the module.

    A head that is known is kept from it until the body is here too; with anything else that comes,
    or if nothing does, it gets all after all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._before: Before | None = None
        self._in_message = False
        self._head_alone = b""
        """A new head that came without its body."""
        self._kept_timer: asyncio.TimerHandle | None = None
        """Runs while a known head is kept, which came without its body."""
        self._began: float | None = None
        """When that head came, until its request knows it."""

    def data_received(self, data: bytes) -> None:
        """Parse, and remember what came as one request."""
        new = self._between
        super().data_received(data)
        head, self._head_alone = self._head_alone, b""
        if self._complete is not None and not self._in_message and (new or head):
            self._before = Before.of(head + data, self._complete)
        elif new and self._held is not None and len(data) <= _LONGEST_HEAD:
            self._head_alone = data

    def repeats(self, data: bytes) -> bool:
        """Whether `data` is dealt with: a request with the head of the one before, or that head."""
        before = self._before
        if before is None or not self._between:
            return False
        if self._stopped_keeping():
            if len(data) == before.length:
                self._repeat(before, bytearray(data))
            else:
                self._parse_kept(before, data)
            return True
        body = before.body_of(data)
        if body is not None:
            self._repeat(before, body)
        elif data == before.bytes_ and before.length <= HIGH_WATER_LIMIT:
            self._idle_since = None
            self._began = time.perf_counter()
            self._kept_timer = self.loop.call_later(HOLD_SECONDS, self._give_up)
        else:
            return False
        return True

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_message = True
        super().on_message_begin()
        self._note_began(self.scope["state"])

    def on_message_complete(self) -> None:
        """A request is here, but for what is told of it."""
        self._in_message = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the request before and the head that is kept."""
        self._before = None
        self._stopped_keeping()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called by uvicorn when the service ends: what has begun is answered."""
        self._give_up()
        super().shutdown()

    @property
    def _between(self) -> bool:
        """Whether all that came is answered, and more may come: a new request's first byte."""
        if self._in_message:
            return False
        return self.cycle is None or (self.cycle.response_complete and self.cycle.keep_alive)

    def _give_up(self) -> None:
        """Let the parser have a head that is kept, and the application wait for the body."""
        if self._stopped_keeping() and self._before is not None:
            self._parse_kept(self._before, b"")
            if self._held is not None:
                self._begin_held()

    def _parse_kept(self, before: Before, data: bytes) -> None:
        self._before = None
        self.data_received(before.bytes_ + data)

    def _stopped_keeping(self) -> bool:
        """Keep a known head no longer; whether one was kept."""
        timer, self._kept_timer = self._kept_timer, None
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _note_began(self, state: dict[str, Any]) -> None:
        if self._began is not None:
            state[BEGAN], self._began = self._began, None

    def _repeat(self, before: Before, body: bytearray) -> None:
        """What the parser and uvicorn would have begun."""
        self._idle_since = None
        state = self.app_state.copy()
        self._note_began(state)
        scope: Any = {**before.scope, "state": state}
        cycle = self.cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=False,
            keep_alive=True,
            on_response=self.on_response_complete,
        )
        cycle.more_body = False
        receive: Any = cycle.receive
        self._serve(cycle, Complete(scope, receive, body, before.head))
