"""Requests that are here in one piece, and their answers, without ASGI's messages.

ASGI hands a body over in messages, because it may come slowly, and takes an answer in messages,
because it may be long. Most predictions are neither: the body arrives together with its head, and
the answer is known as a whole. For those the connection asks each layer for its `answer`; the same
layers and routes serve as for any other request, and what they do stands in them once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final, NamedTuple, Protocol, runtime_checkable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.departure import Departure

BEGAN: Final = "began"
"""In a scope's state: the `time.perf_counter` at which its head came, if it was held since."""


class Complete(Request):
    """A request with its whole body in `content`, a buffer that nobody else uses.

    The connection tells its `departure` when the client leaves.
    """

    def __init__(self, scope: Scope, receive: Receive, content: bytearray) -> None:
        super().__init__(scope, receive)
        self.content = content
        self.departure = Departure()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body as starlette gives it; `receive` would wait for it in vain."""
        yield bytes(self.content)
        yield b""


@runtime_checkable
class Layer(Protocol):
    """An ASGI application that can answer a complete request without messages too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve any request."""

    async def answer(self, request: Complete) -> Response:
        """The whole response, no stream. Raises starlette's ClientDisconnect alone."""


class Shortcut(NamedTuple):
    """How an application answers complete requests: POSTs to the paths that `takes` allows."""

    takes: Callable[[str], bool]
    answer: Callable[[Complete], Awaitable[Response]]
