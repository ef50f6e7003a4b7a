"""The application that an HTTP server runs in a process of its own: every request is passed on."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, Final, NamedTuple, TypeAlias

from service.relay import wire
from service.relay.memory import Blocks
from service.relay.wire import Link

_INLINE_BYTES: Final = 1 << 15
"""Up to here a body costs less over the socket than a place in shared memory."""
_WINDOW_BYTES: Final = 1 << 20
"""How much of a body that is too large to be held the application may be behind."""
_ACKNOWLEDGED_BYTES: Final = 1 << 18
_GATHER_SECONDS: Final = 0.25
"""A body that takes longer is passed on as far as it is, so that its pace can be judged."""
_LEFT: Final = -1


Stream: TypeAlias = "Callable[[Any], Awaitable[None]]"
"""Given ASGI's `send`, sends an answer on as it comes. Raises Aborted."""


class Aborted(Exception):
    """The application failed before its answer was complete; it has said why in its own log."""


class _Exchange:
    """One request: what the other side sent, and what it has yet to take of the body."""

    __slots__ = ("_room", "arrived", "ended", "pulled", "unconsumed")

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self.pulled = asyncio.Event()
        self.ended = False
        self.unconsumed = 0
        self._room = asyncio.Event()

    def consumed(self, size: int) -> None:
        self.unconsumed -= size
        self._room.set()

    async def room(self) -> None:
        """Wait until the application has taken what it was sent, but for a window."""
        while self.unconsumed > _WINDOW_BYTES:
            self._room.clear()
            await self._room.wait()


class Answer(NamedTuple):
    """An answer as a whole; `lines` are those of its headers, as they are sent."""

    status: int
    lines: bytes
    body: bytes


class Front(Link):
    """An ASGI application, and the front's end of the link; see the package.

    `drain` is called when the back wants this process to end, `lost` when the back is gone.
    """

    def __init__(
        self, memory: mmap.mmap, drain: Callable[[], None], lost: Callable[[], None]
    ) -> None:
        super().__init__()
        self._memory = memory
        self._blocks = Blocks(len(memory))
        self._holders: dict[int, int] = {}
        self._largest_whole = len(memory) // 2
        self._drain, self._lost = drain, lost
        self._numbers = count(1)
        self._open: dict[int, _Exchange] = {}
        self._loop: asyncio.AbstractEventLoop
        self._asked: dict[int, asyncio.Future[Answer | Stream]] = {}

    # ---- whole requests -------------------------------------------------------------------

    def introduce(self, scope: Any) -> int:
        """Tell of a head that requests are going to begin with; its number, for `ask`."""
        number = next(self._numbers)
        self._loop = asyncio.get_running_loop()
        self.write(wire.HEAD, number, wire.pack_scope(scope))
        return number

    def forget(self, head: int) -> None:
        """No request will begin with that head any more.

        May be called at any moment, in the middle of a write too: the garbage collector does.
        """
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.write, wire.FORGET, head)

    async def ask(self, head: int, body: bytearray) -> Answer | Stream:
        """Have a request answered that is here as a whole, with its body of at most 512 KiB.

        Cancelling it is the client's departure. Raises Aborted if its application failed.
        """
        number = next(self._numbers)
        asked: asyncio.Future[Answer | Stream] = asyncio.get_running_loop().create_future()
        self._asked[number] = asked
        self.write_soon(wire.WHOLE, number, wire.COUNT.pack(head), body)
        try:
            return await asked
        except asyncio.CancelledError:
            self.write(wire.GONE, number)
            self._open.pop(number, None)  # the answer had just begun
            raise
        finally:
            del self._asked[number]

    # ---- the application ------------------------------------------------------------------

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Have a request answered by the back. Raises Aborted if its application failed midway."""
        number, exchange = next(self._numbers), _Exchange()
        self._open[number] = exchange
        forwarding = asyncio.ensure_future(self._forward(number, exchange, scope, receive))
        try:
            await self._stream(number, exchange, send)
        finally:
            forwarding.cancel()

    async def _stream(self, number: int, exchange: _Exchange, send: Any) -> None:
        """Send on what comes, to the end. Raises Aborted."""
        try:
            await self._answer(number, exchange, send)
        finally:
            del self._open[number]
            if not exchange.ended:
                self.write(wire.GONE, number)

    async def _answer(self, number: int, exchange: _Exchange, send: Any) -> None:
        """Send on what comes. Raises Aborted."""
        unacknowledged = 0
        while not exchange.ended:
            kind, payload = await exchange.arrived.get()
            if kind == wire.START:
                await send(wire.unpack_start(payload))
                continue
            if kind == _LEFT:
                return
            exchange.ended = kind in (wire.END, wire.ABORT)
            if kind == wire.ABORT:
                raise Aborted
            more = kind == wire.BODY
            await send({"type": "http.response.body", "body": payload, "more_body": more})
            unacknowledged += len(payload)
            if more and unacknowledged >= _ACKNOWLEDGED_BYTES:
                self.write(wire.TAKEN, number, wire.COUNT.pack(unacknowledged))
                unacknowledged = 0

    async def _forward(self, number: int, exchange: _Exchange, scope: Any, receive: Any) -> None:
        """Pass head and body on, then watch for the client's departure.

        A small body is here already, and leaves in the same write: the back wakes once.
        """
        self.write(wire.OPEN, number, wire.pack_scope(scope))
        try:
            headers = dict(scope["headers"])
            if b"expect" in headers:  # the first `receive` tells the client to go on
                await exchange.pulled.wait()
            length = headers.get(b"content-length", b"")
            declared = int(length) if length.isdigit() else None
            if declared is not None and _INLINE_BYTES < declared <= self._largest_whole:
                here = await self._whole(number, exchange, declared, receive)
            else:
                here = await self._pieces(number, exchange, receive)
            while here:
                here = (await receive())["type"] != "http.disconnect"
        finally:
            exchange.arrived.put_nowait((_LEFT, b""))

    async def _pieces(self, number: int, exchange: _Exchange, receive: Any) -> bool:
        """Pass a body on as it comes; whether the client was there to its end."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            body, more = message.get("body", b""), message.get("more_body", False)
            await self._pass_on(number, exchange, body, more)
        return True

    async def _pass_on(self, number: int, exchange: _Exchange, body: bytes, more: bool) -> None:
        await exchange.room()
        exchange.unconsumed += len(body)
        block = self._blocks.take(len(body)) if len(body) > _INLINE_BYTES else None
        if block is not None:
            self._holders[block] = 1
            self._memory[block : block + len(body)] = body
            self.write(wire.PLACED, number, wire.PLACE.pack(block, block, len(body), more))
            return
        view = memoryview(body)
        while len(view) > wire.PIECE_BYTES:
            self.write(wire.DATA, number, view[: wire.PIECE_BYTES])
            view = view[wire.PIECE_BYTES :]
        self.write(wire.DATA if more else wire.DATA_END, number, view)

    async def _whole(self, number: int, exchange: _Exchange, size: int, receive: Any) -> bool:
        """Gather a body of `size` bytes in one block; whether the client was there to its end.

        Its place is taken when its first bytes are here: declaring costs a client nothing. With
        no place left it is passed on in pieces.
        """
        block, filled, passed = None, 0, 0
        try:
            while True:
                unsent = filled > passed
                try:
                    async with asyncio.timeout(_GATHER_SECONDS if unsent else None):
                        message = await receive()
                except TimeoutError:
                    message = None
                if message is not None:
                    if message["type"] == "http.disconnect":
                        return False
                    body, more = message.get("body", b""), message.get("more_body", False)
                    if block is None:
                        block = self._blocks.take(size)
                        if block is None:
                            await self._pass_on(number, exchange, body, more)
                            return not more or await self._pieces(number, exchange, receive)
                        self._holders[block] = 1
                        due = asyncio.get_running_loop().time() + _GATHER_SECONDS
                    if filled + len(body) > size:
                        raise ValueError("a body is longer than its head says")
                    self._memory[block + filled : block + filled + len(body)] = body
                    filled += len(body)
                    if more and asyncio.get_running_loop().time() < due:
                        continue
                else:
                    more = True
                assert block is not None
                self._holders[block] += 1
                exchange.unconsumed += filled - passed
                place = wire.PLACE.pack(block, block + passed, filled - passed, more)
                self.write(wire.PLACED, number, place)
                passed = filled
                due = asyncio.get_running_loop().time() + _GATHER_SECONDS
                if not more:
                    return True
        finally:
            if block is not None:
                self._release(block)

    def _release(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            del self._holders[block]
            self._blocks.give_back(block)

    # ---- the link -------------------------------------------------------------------------

    def received(self, kind: int, number: int, payload: bytes) -> None:
        """Free shared memory, begin the drain, or hand a frame to its request if still open."""
        if kind == wire.FREE:
            self._release(wire.COUNT.unpack(payload)[0])
        elif kind == wire.DRAIN:
            self._drain()
        elif (asked := self._asked.get(number)) is not None and not asked.done():
            self._answered(asked, kind, number, payload)
        elif (exchange := self._open.get(number)) is None:
            pass  # over for the client, and the application has yet to hear of it
        elif kind == wire.PULL:
            exchange.pulled.set()
        elif kind == wire.CONSUMED:
            exchange.consumed(wire.COUNT.unpack(payload)[0])
        else:
            exchange.arrived.put_nowait((kind, payload))

    def _answered(
        self, asked: asyncio.Future[Answer | Stream], kind: int, number: int, payload: bytes
    ) -> None:
        """The first of a whole request's answer: all of it, or its head.

        An application of messages may say something of the body before: it has all of that.
        """
        if kind == wire.ANSWER:
            status, size = wire.ANSWERED.unpack_from(payload)
            body = wire.ANSWERED.size + size
            asked.set_result(Answer(status, payload[wire.ANSWERED.size : body], payload[body:]))
        elif kind == wire.ABORT:
            asked.set_exception(Aborted())
        elif kind == wire.START:
            exchange = self._open[number] = _Exchange()
            exchange.arrived.put_nowait((kind, payload))
            asked.set_result(partial(self._stream, number, exchange))

    def connection_lost(self, error: Exception | None) -> None:
        """The back is gone, in order or by accident: `lost` is called."""
        self._lost()
