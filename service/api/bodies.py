"""Request bodies: read in pieces or whole, never more than allowed, never waiting for ever."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import lru_cache

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from service.api.complete import Complete
from service.api.state import of
from service.errors import BadInput, RequestStalled, UploadTooLarge
from service.relay.back import BODY_VIEWS

_KNOWN_TYPES = 256


def media_type(request: Request) -> str:
    """The body's media type in lower case without parameters; empty when none is given."""
    return _media_type(request.headers.get("content-type", ""))


@lru_cache(_KNOWN_TYPES)
def _media_type(value: str) -> str:
    return value.split(";", 1)[0].strip().lower()


def declared_length(request: Request) -> int | None:
    """The body's length in bytes if its head tells."""
    value = request.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else None


def too_large(limit: int, setting: str) -> UploadTooLarge:
    """The error for a body of more than `limit` bytes, naming the variable that raises it."""
    return UploadTooLarge(
        f"The body is larger than {limit} bytes.",
        remedy=f"Send less at once, or raise {setting}.",
        limit=limit,
    )


async def chunks(request: Request, idle_seconds: float) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises RequestStalled after `idle_seconds` without a byte, or when it comes slower than
    `min_bytes_per_second` on the whole, and starlette's ClientDisconnect. Only the time spent
    waiting counts: a disk that is slow to take the bytes is not the client's fault.
    """
    if isinstance(request, Complete):
        yield bytes(request.content)
        return
    body = _Body(request, idle_seconds)
    more = True
    while more:
        chunk, more = await body.next()
        if chunk:
            yield bytes(chunk)


class _Body:
    """A body that is arriving. `next` answers what came next, and whether there is more to come.

    It raises what `chunks` raises.
    """

    __slots__ = ("_idle", "_receive", "_received", "_slowest", "_waited")

    def __init__(self, request: Request, idle_seconds: float) -> None:
        self._receive = request.receive
        self._idle = idle_seconds
        self._slowest = of(request).settings.min_bytes_per_second
        self._received, self._waited = 0, 0.0

    async def next(self) -> tuple[bytes | memoryview, bool]:
        earned = self._received / self._slowest if self._slowest else math.inf
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(self._idle, self._idle + earned - self._waited)):
                message = await self._receive()
        except TimeoutError:
            raise _stalled(self._received, self._waited + time.monotonic() - began) from None
        self._waited += time.monotonic() - began
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk: bytes | memoryview = message.get("body", b"")
        self._received += len(chunk)
        return chunk, message.get("more_body", False)


def _stalled(received: int, seconds: float) -> RequestStalled:
    return RequestStalled(f"Only {received} bytes arrived in {seconds:.1f} s.")


async def whole(
    request: Request, limit: int, idle_seconds: float, setting: str
) -> bytearray | bytes:
    """The whole body, of at most `limit` bytes: what arrived in one piece as it is, else joined.

    Raises UploadTooLarge naming `setting`, RequestStalled, or starlette's ClientDisconnect.
    """
    body = await _whole(request, limit, idle_seconds, setting)
    assert not isinstance(body, memoryview), "no view was asked for"
    return body


async def whole_or_view(
    request: Request, limit: int, idle_seconds: float, setting: str
) -> bytearray | bytes | memoryview:
    """`whole`, for those that can read a view of memory that another process has written.

    It is not copied then, and its place is free again once the view and what was made of it are
    gone.
    """
    allow = (request.scope.get("extensions") or {}).get(BODY_VIEWS)
    if allow is not None:
        allow()
    return await _whole(request, limit, idle_seconds, setting)


async def _whole(
    request: Request, limit: int, idle_seconds: float, setting: str
) -> bytearray | bytes | memoryview:
    if isinstance(request, Complete):
        if len(request.content) > limit:
            raise too_large(limit, setting)
        return request.content
    length = declared_length(request)
    if length is not None and length > limit:
        raise too_large(limit, setting)
    arriving = _Body(request, idle_seconds)
    first, more = await arriving.next()
    if not more and len(first) <= limit:
        return first
    # Grown as bytes arrive, not by what is declared: declaring costs a client nothing.
    body = bytearray(first)
    while len(body) <= limit:
        if not more:
            return body
        chunk, more = await arriving.next()
        body += chunk
    raise too_large(limit, setting)


@dataclass
class Part:
    """The head of one part of a multipart body."""

    name: str = ""
    filename: str | None = None
    media_type: str = ""


class MultipartReader:
    """Feeds a `multipart/form-data` body through python-multipart, part by part.

    `read` yields a `Part` when one begins, `bytes` for its content in pieces, and None at its end.
    Raises BadInput for a malformed body.
    """

    def __init__(self, request: Request, idle_seconds: float) -> None:
        _, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 70:
            raise _malformed("its Content-Type names no boundary")
        settings = of(request).settings
        self._max_parts = settings.max_parts
        self._max_header_bytes = settings.max_part_header_bytes
        self._body = chunks(request, idle_seconds)
        self._events: list[Part | bytes | None] = []
        self._parts = 0
        self._header_bytes = 0
        self._field = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    async def read(self) -> AsyncIterator[Part | bytes | None]:
        """See the class."""
        async for chunk in self._body:
            try:
                self._parser.write(chunk)
            except MultipartParseError as error:
                raise _malformed(str(error)) from None
            events, self._events = self._events, []
            for event in events:
                yield event
        if not self._complete:
            raise _malformed("its final boundary is missing")

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_parts:
            raise _malformed(f"it has more than {self._max_parts} parts")
        self._headers, self._header_bytes = {}, 0

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > self._max_header_bytes:
            raise _malformed(f"a part's headers exceed {self._max_header_bytes} bytes")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise _malformed("a part has no name")
        filename = options.get(b"filename")
        kind = self._headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
        self._events.append(
            Part(
                name=options[b"name"].decode("utf-8", "replace"),
                filename=None if filename is None else filename.decode("utf-8", "replace"),
                media_type=kind.decode("latin-1"),
            )
        )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _on_part_end(self) -> None:
        self._events.append(None)

    def _on_end(self) -> None:
        self._complete = True


def _malformed(reason: str) -> BadInput:
    return BadInput(
        f"The multipart body is malformed: {reason}.",
        remedy="Send multipart/form-data as any HTTP client builds it, such as `curl -F`.",
    )
