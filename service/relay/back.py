"""The application's end of a link: runs the application for the requests of one front."""

from __future__ import annotations

import asyncio
import logging
import mmap
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from service.relay import wire
from service.relay.wire import Link

BODY_VIEWS: Final = "foldserve.body_views"
"""The scope's extension: a function that an application calls when it takes `memoryview`s of shared
memory as bodies. Without that call bodies are `bytes`, as the standard says."""

_WINDOW_BYTES: Final = 1 << 20
"""How much of an answer may be on its way to a client that does not take it."""

_OF_A_REQUEST: Final = frozenset({wire.DATA, wire.DATA_END, wire.GONE, wire.TAKEN})

log = logging.getLogger(__name__)

ASGIApp: TypeAlias = "Callable[[Any, Any, Any], Awaitable[None]]"


class Whole(Protocol):
    """A request that is here as a whole."""

    async def answer(self) -> tuple[int, bytes, bytes] | ASGIApp | None:
        """Status, the lines of the headers and the body, or what sends it in messages.

        None if the client left first.
        """

    def leave(self) -> None:
        """Its client has left: no answer is wanted any more."""


class Answerer(Protocol):
    """How an application answers requests that are here as a whole."""

    def know(self, scope: dict[str, Any]) -> Any:
        """What it wants to know of a head; None if requests with it are to come in messages."""

    def whole(self, known: Any, body: bytearray) -> Whole:
        """A request with such a head."""


class Back(Link):
    """See the module.

    `answerer` is asked about whole requests, if there is one. `memory` is what the front writes
    to. The tasks of running requests are in `tasks`. `ready` is called when the front serves,
    `lost` when it is gone: by then its requests know that their clients left.
    """

    def __init__(
        self,
        app: Any,
        memory: mmap.mmap,
        tasks: set[asyncio.Task[None]],
        ready: Callable[[], None],
        lost: Callable[[], None],
        answerer: Answerer | None = None,
    ) -> None:
        super().__init__()
        self._app = app
        self._answerer = answerer
        self._memory = memory
        self._tasks = tasks
        self._ready, self._lost = ready, lost
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, _Exchange] = {}
        self._whole: dict[int, Whole] = {}
        self._heads: dict[int, tuple[dict[str, Any], Any]] = {}

    def drain(self) -> None:
        """Let the front end once it has answered."""
        self.write(wire.DRAIN, 0)

    def received(self, kind: int, number: int, payload: bytes) -> None:
        """Begin a request, or hand a frame to its own; frames of one that is over are dropped."""
        if kind == wire.HELLO:
            self._ready()
            return
        if kind == wire.OPEN:
            self._begin(number, wire.unpack_scope(payload))
            return
        if kind == wire.HEAD:
            scope = wire.unpack_scope(payload)
            known = None if self._answerer is None else self._answerer.know(scope)
            self._heads[number] = scope, known
            return
        if kind == wire.FORGET:
            del self._heads[number]
            return
        exchange = self._open.get(number)
        if kind == wire.PLACED:
            block, first, size, more = wire.PLACE.unpack(payload)
            view = self._view(block, first, size)  # freed when it is dropped, here too
            if exchange is not None:
                exchange.arrive(view, more)
        elif kind not in _OF_A_REQUEST:
            raise ValueError(f"a frame of the kind {kind}")
        elif kind == wire.GONE and number in self._whole:
            self._whole[number].leave()
        elif exchange is None:
            pass  # the application has ended
        elif kind in (wire.DATA, wire.DATA_END):
            exchange.arrive(payload, kind == wire.DATA)
        elif kind == wire.GONE:
            exchange.leave()
        else:
            exchange.taken(wire.COUNT.unpack(payload)[0])

    def connection_lost(self, error: Exception | None) -> None:
        """The front is gone: open requests see that their clients left, then `lost` is called."""
        for exchange in self._open.values():
            exchange.leave()
        for whole in self._whole.values():
            whole.leave()
        self._lost()

    def _begin(self, number: int, scope: dict[str, Any]) -> _Exchange:
        exchange = self._open[number] = _Exchange(self, number, scope)
        self._spawn(self._run(number, self._app, exchange))
        return exchange

    def received_whole(self, number: int, payload: memoryview) -> None:
        """Begin a request that is here as a whole. Raises KeyError for a head that is not known."""
        scope, known = self._heads[wire.COUNT.unpack_from(payload)[0]]
        body = payload[wire.COUNT.size :]
        if known is None:
            self._begin(number, scope).arrive(bytes(body), more=False)
            return
        assert self._answerer is not None
        whole = self._whole[number] = self._answerer.whole(known, bytearray(body))
        self._spawn(self._answer(number, whole, scope))

    def _spawn(self, running: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(running)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, whole: Whole, scope: dict[str, Any]) -> None:
        """Answer a whole request, in one frame if that can be."""
        try:
            answer = await whole.answer()
        except BaseException as error:
            self.write(wire.ABORT, number)
            if not isinstance(error, Exception):  # the end of the drain
                raise
            log.exception("Exception in ASGI application")
            return
        finally:
            del self._whole[number]
        if isinstance(answer, tuple):
            status, lines, body = answer
            self.write_soon(
                wire.ANSWER, number, wire.ANSWERED.pack(status, len(lines)), lines, body
            )
        elif answer is not None:
            exchange = self._open[number] = _Exchange(self, number, scope)
            await self._run(number, answer, exchange)

    async def _run(self, number: int, app: ASGIApp, exchange: _Exchange) -> None:
        try:
            await app(exchange.scope, exchange.receive, exchange.send)
        except Exception:
            log.exception("Exception in ASGI application")
        finally:
            if not exchange.over:
                self.write(wire.ABORT, number)
            del self._open[number]

    def _view(self, block: int, first: int, size: int) -> memoryview:
        """A part of the shared memory; its block is free again when nothing refers to it."""
        held = np.frombuffer(self._memory, np.uint8, size, first)
        weakref.finalize(held, self._release, block).atexit = False
        return held.data

    def _release(self, block: int) -> None:
        """Called on any thread: wherever the last reference was."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.write, wire.FREE, 0, wire.COUNT.pack(block))


class _Exchange:
    """One request, as its application sees it."""

    __slots__ = (
        "_arrived",
        "_ended",
        "_gone",
        "_link",
        "_news",
        "_number",
        "_silent",
        "_unread",
        "_views",
        "scope",
    )

    def __init__(self, link: Link, number: int, scope: dict[str, Any]) -> None:
        self._link, self._number = link, number
        self._arrived: deque[tuple[bytes | memoryview, bool]] = deque()
        self._news = asyncio.Event()
        self._gone = self._ended = self._views = False
        self._unread = 0
        self._silent = any(name == b"expect" for name, _ in scope["headers"])
        self.scope = scope | {"state": {}, "extensions": {BODY_VIEWS: self._allow_views}}

    @property
    def over(self) -> bool:
        """Whether nothing is left to answer, or nobody."""
        return self._gone or self._ended

    # ---- what the front says ----------------------------------------------------------------

    def arrive(self, piece: bytes | memoryview, more: bool) -> None:
        self._arrived.append((piece, more))
        self._news.set()

    def leave(self) -> None:
        self._gone = True
        self._arrived.clear()
        self._news.set()

    def taken(self, size: int) -> None:
        self._unread -= size
        self._news.set()

    # ---- what the application calls ---------------------------------------------------------

    def _allow_views(self) -> None:
        self._views = True

    async def receive(self) -> dict[str, Any]:
        if self._silent:
            self._silent = False
            self._link.write(wire.PULL, self._number)
        while not self._arrived:
            if self.over:
                return {"type": "http.disconnect"}
            self._news.clear()
            await self._news.wait()
        piece, more = self._arrived.popleft()
        if not self._views and isinstance(piece, memoryview):
            if len(piece) > wire.PIECE_BYTES:
                self._arrived.appendleft((piece[wire.PIECE_BYTES :], more))
                piece, more = piece[: wire.PIECE_BYTES], True
            piece = bytes(piece)
        if more:
            self._link.write(wire.CONSUMED, self._number, wire.COUNT.pack(len(piece)))
        return {"type": "http.request", "body": piece, "more_body": more}

    async def send(self, message: Any) -> None:
        if self.over:
            return
        if message["type"] == "http.response.start":
            self._link.write(wire.START, self._number, wire.pack_start(message))
            return
        rest = memoryview(message.get("body", b""))
        more = message.get("more_body", False)
        while len(rest) > wire.PIECE_BYTES:
            await self._pass_on(rest[: wire.PIECE_BYTES])
            rest = rest[wire.PIECE_BYTES :]
        if more:
            await self._pass_on(rest)
        elif not self.over:
            self._ended = True
            self._link.write(wire.END, self._number, rest)
            self._news.set()

    async def _pass_on(self, piece: memoryview) -> None:
        while self._unread > _WINDOW_BYTES and not self._gone:
            self._news.clear()
            await self._news.wait()
        if not self._gone:
            self._unread += len(piece)
            self._link.write(wire.BODY, self._number, piece)
