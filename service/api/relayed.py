"""Whole requests across the link between HTTP processes and the device process.

`Passing` is the application of an HTTP process: a whole request goes over in one frame and comes
back in one, and a head that requests repeat goes over once. `Relayed` is how the device process
answers it: by the layers and routes that answer whole requests on its own connections.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.complete import Complete, Head, InMessages, Shortcut
from service.api.known import MadeResponse
from service.api.whole import lines
from service.relay.back import ASGIApp, Whole
from service.relay.front import Answer, Front


class Passing:
    """The application of an HTTP process; see the module."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self.complete = Shortcut(lambda path: True, self._answer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on message by message."""
        await self._front(scope, receive, send)

    async def _answer(self, request: Complete) -> Response:
        """Pass a whole request on. Raises ClientDisconnect, and Aborted as `Front.ask` does."""
        head = request.head
        if head.number is None:
            head.number = self._front.introduce(request.scope)
            weakref.finalize(head, self._front.forget, head.number).atexit = False
        with request.departure:
            answer = await self._front.ask(head.number, request.content)
        if isinstance(answer, Answer):
            return MadeResponse(*answer)
        stream = answer

        async def send_on(send: Send) -> None:
            with suppress(ClientDisconnect), request.departure:
                await stream(send)

        return InMessages(send_on)


class _Known(NamedTuple):
    scope: dict[str, Any]
    head: Head
    shortcut: Shortcut


class Relayed:
    """Answers whole requests for the other end of a link; see `service.relay.back.Answerer`."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def know(self, scope: dict[str, Any]) -> _Known | None:
        """See `Answerer`."""
        shortcut: Shortcut | None = getattr(self._app, "complete", None)
        if shortcut is None or scope["method"] != "POST" or not shortcut.takes(scope["path"]):
            return None
        return _Known(scope | {"app": self._app}, Head(scope["headers"]), shortcut)

    def whole(self, known: _Known, body: bytearray) -> Whole:
        """See `Answerer`."""
        scope = {**known.scope, "state": {}}
        return _Request(Complete(scope, _receive, body, known.head), known.shortcut)


class _Request:
    """See `service.relay.back.Whole`."""

    __slots__ = ("_request", "_shortcut")

    def __init__(self, request: Complete, shortcut: Shortcut) -> None:
        self._request, self._shortcut = request, shortcut

    async def answer(self) -> tuple[int, bytes, bytes] | ASGIApp | None:
        try:
            response = await self._shortcut.answer(self._request)
        except ClientDisconnect:
            return None
        made = None
        if response.background is None:
            made = lines(response.raw_headers, response.body)
        return response if made is None else (response.status_code, made, bytes(response.body))

    def leave(self) -> None:
        self._request.departure.tell()


async def _receive() -> dict[str, Any]:
    raise RuntimeError("a whole request has no messages")
