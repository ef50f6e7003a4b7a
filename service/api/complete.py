"""Requests that are here in one piece, and their answers, without ASGI's messages.

ASGI hands a body over in messages, because it may come slowly, and takes an answer in messages,
because it may be long. Most predictions are neither: the body arrives together with its head, and
the answer is known as a whole. For those the connection asks each layer for its `answer`; the same
layers and routes serve as for any other request, and what they do stands in them once.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.api.whole import write


class Complete(Request):
    """A request with its whole body in `content`, a buffer that nobody else uses.

    Its `receive` has nothing more to tell than that the client left; `waiting` is quicker.
    """

    def __init__(self, scope: Scope, receive: Receive, content: bytearray) -> None:
        super().__init__(scope, receive)
        self.content = content
        self.departed = False
        self.task: asyncio.Task[None] | None = None
        self._may_cancel = False

    def depart(self) -> None:
        """The client left: whoever is `waiting` need not."""
        self.departed = True
        if self._may_cancel and self.task is not None:
            self.task.cancel()

    def __enter__(self) -> None:
        """From now on a departure cancels the task that serves the request."""
        if self.departed:
            raise ClientDisconnect
        self._may_cancel = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """No longer; where it has cancelled, ClientDisconnect is raised instead."""
        self._may_cancel = False
        if kind is asyncio.CancelledError and self.departed and self._uncancelled():
            raise ClientDisconnect from None

    def _uncancelled(self) -> bool:
        """Take the departure's cancelling back; whether nobody else has cancelled too."""
        return self.task is not None and self.task.uncancel() == 0


class Layer(Protocol):
    """An ASGI application that can answer a complete request without messages too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve any request."""

    def takes(self, path: str) -> bool:
        """Whether a POST to that path may be asked for by `answer`."""

    async def answer(self, request: Complete) -> Response:
        """The response to a request that `takes` allows. Raises ClientDisconnect alone."""


def answering(layers: Layer, request: Complete, cycle: RequestResponseCycle) -> ASGIApp:
    """An ASGI application for the one request of `cycle`."""

    async def serve(scope: Scope, receive: Receive, _send: Send) -> None:
        try:
            response = await layers.answer(request)
        except ClientDisconnect:
            return
        if not write(cycle, response.status_code, response.raw_headers, response.body):
            send: Any = cycle.send
            await response(scope, receive, send)

    return serve
