"""Requests that are here in one piece, and their answers, without ASGI's messages.

ASGI hands a body over in messages, because it may come slowly, and takes an answer in messages,
because it may be long. Most predictions are neither: the body arrives together with its head, and
the answer is known as a whole. For those the connection asks each layer for its `answer`; the same
layers and routes serve as for any other request, and what they do stands in them once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.departure import Departure

BEGAN: Final = "began"
"""In a scope's state: the `time.perf_counter` at which its head came, if it was held since."""


class Head:
    """What a request's headers say, looked up once for all requests that repeat them.

    `fields` has each header's value, the last one of those that come more than once.
    """

    __slots__ = ("__weakref__", "checked_by", "fields", "headers", "number")

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        self.fields = dict(raw)
        self.headers = _Headers(raw)
        self.checked_by: object = None
        """The guard that found nothing against it, but for who asks and how often."""
        self.number: int | None = None
        """By which the device process knows it, if this is an HTTP process."""


class _Headers(Headers):
    """Starlette's headers, found by hash; it compares name after name at each look."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        super().__init__(raw=raw)
        self._first = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(raw)
        }

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower()]

    def get(self, key: str, default: Any = None) -> Any:
        return self._first.get(key.lower(), default)


class Complete(Request):
    """A request with its whole body in `content`, a buffer that nobody else uses.

    `head` may be that of an earlier request with the same headers. The connection tells its
    `departure` when the client leaves.
    """

    def __init__(
        self, scope: Scope, receive: Receive, content: bytearray, head: Head | None = None
    ) -> None:
        super().__init__(scope, receive)
        self.content = content
        self.head = head or Head(scope["headers"])
        self.departure = Departure()

    @property
    def headers(self) -> Headers:
        """See starlette."""
        return self.head.headers

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body as starlette gives it; `receive` would wait for it in vain."""
        yield bytes(self.content)
        yield b""


class InMessages(Response):
    """An answer that turned out to be no whole one: `send_on`, given ASGI's `send`, sends it."""

    def __init__(self, send_on: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._send_on = send_on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self._send_on(send)


@runtime_checkable
class Layer(Protocol):
    """An ASGI application that can answer a complete request without messages too."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve any request."""

    def answer(self, request: Complete) -> Awaitable[Response]:
        """The whole response, no stream. Raises starlette's ClientDisconnect alone."""


class Shortcut(NamedTuple):
    """How an application answers complete requests: POSTs to the paths that `takes` allows."""

    takes: Callable[[str], bool]
    answer: Callable[[Complete], Awaitable[Response]]
