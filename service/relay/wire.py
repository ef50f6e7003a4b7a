"""Frames over a stream socket: a kind, the number of a request, and a payload.

Payloads are JSON, fixed structures or raw bytes, so that a front that strangers have taken over can
make the other side believe any request, but not run anything there.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Final, cast

import orjson

HELLO: Final = 0
"""Front: it serves. Number 0, as in DRAIN."""
OPEN: Final = 1
"""Front: a request has begun; its scope."""
DATA: Final = 2
"""Front: a piece of its body."""
DATA_END: Final = 3
"""Front: its last piece."""
PLACED: Final = 4
"""Front: a piece of its body lies in shared memory (`PLACE`)."""
GONE: Final = 5
"""Front: the client has left, or takes no more of the answer."""
TAKEN: Final = 6
"""Front: so many bytes of the answer were sent on (`COUNT`)."""
WHOLE: Final = 7
"""Front: a request that is here as a whole: the number of its head (`COUNT`), and its body."""
HEAD: Final = 8
"""Front: a head that requests may begin with; its scope. The number is the head's own."""
FORGET: Final = 9
"""Front: no request will begin with that head any more."""
DRAIN: Final = 10
"""Back: take no new connection, answer those that are there, end."""
PULL: Final = 11
"""Back: the application wants the body of a request that expects to be told."""
CONSUMED: Final = 12
"""Back: the application took so many bytes of the body, and more will come (`COUNT`)."""
FREE: Final = 13
"""Back: a piece in shared memory is not needed any more (`COUNT`: its block)."""
START: Final = 14
"""Back: status and headers."""
BODY: Final = 15
"""Back: a piece of the answer."""
END: Final = 16
"""Back: its last piece."""
ABORT: Final = 17
"""Back: the application failed before the answer was complete."""

ANSWER: Final = 18
"""Back: a whole answer (`ANSWERED`): the lines of its headers as they are sent, and its body."""

COUNT: Final = struct.Struct("<Q")
PLACE: Final = struct.Struct("<QQQ?")  # block, first byte, bytes, whether more of the body follows
ANSWERED: Final = struct.Struct("<HI")  # status, bytes of the lines of its headers
PIECE_BYTES: Final = 1 << 18
"""Largest body in one frame."""

_HEAD: Final = struct.Struct("<BQI")
_LARGEST: Final = 1 << 20
_TEXT: Final = "latin-1"


class Link(asyncio.Protocol):
    """One end of the socket."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._soon: list[bytes | bytearray] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From now on frames are sent; those written before are lost."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        """Hand whole frames to `received`; keep the rest. Raises ValueError for one over 1 MiB."""
        data = self._rest + data if self._rest else data
        at, size = 0, len(data)
        while size - at >= _HEAD.size:
            kind, number, length = _HEAD.unpack_from(data, at)
            if length > _LARGEST:
                raise ValueError(f"a frame of {length} bytes")
            begin = at + _HEAD.size
            if begin + length > size:
                break
            at = begin + length
            if kind == WHOLE:
                self.received_whole(number, memoryview(data)[begin:at])
            else:
                self.received(kind, number, data[begin:at])
        self._rest = data[at:]

    def write(self, kind: int, number: int, payload: bytes | memoryview = b"") -> None:
        """Send a frame; into nothing when the other side is gone."""
        if self._soon:
            self._flush()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(_HEAD.pack(kind, number, len(payload)))
            if payload:
                self._transport.write(payload)

    def write_soon(self, kind: int, number: int, *payload: bytes | bytearray) -> None:
        """Send a small frame along with others of this turn of the loop; order is kept."""
        frame = (_HEAD.pack(kind, number, sum(map(len, payload))), *payload)
        if not self._soon:
            asyncio.get_running_loop().call_soon(self._flush)
        self._soon.extend(frame)

    def _flush(self) -> None:
        soon, self._soon = self._soon, []
        if soon and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(soon))

    def received(self, kind: int, number: int, payload: bytes) -> None:
        """A frame has come. Raises ValueError, KeyError or struct.error where it makes no sense."""
        raise NotImplementedError

    def received_whole(self, number: int, payload: memoryview) -> None:
        """`received` for WHOLE, whose body is copied once: by whoever keeps it."""
        raise ValueError("a whole request, where none is answered")

    def close(self) -> None:
        """End the link, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()


def pack_scope(scope: Any) -> bytes:
    """What an application needs of an HTTP scope."""
    return orjson.dumps(
        [
            scope["method"],
            scope["path"],
            scope["raw_path"].decode(_TEXT),
            scope["query_string"].decode(_TEXT),
            scope["http_version"],
            scope["scheme"],
            scope["root_path"],
            scope["client"],
            scope["server"],
            _texts(scope["headers"]),
        ]
    )


def unpack_scope(payload: bytes) -> dict[str, Any]:
    """The scope that `pack_scope` was given, without state and extensions."""
    (
        method,
        path,
        raw_path,
        query_string,
        http_version,
        scheme,
        root_path,
        client,
        server,
        headers,
    ) = orjson.loads(payload)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": http_version,
        "method": method,
        "scheme": scheme,
        "path": path,
        "raw_path": raw_path.encode(_TEXT),
        "query_string": query_string.encode(_TEXT),
        "root_path": root_path,
        "headers": _pairs(headers),
        "client": client and tuple(client),
        "server": server and tuple(server),
    }


def pack_start(message: Any) -> bytes:
    """Status and headers of a response."""
    return orjson.dumps([message["status"], _texts(message.get("headers", ()))])


def unpack_start(payload: bytes) -> dict[str, Any]:
    """The message that `pack_start` was given."""
    status, headers = orjson.loads(payload)
    return {"type": "http.response.start", "status": status, "headers": _pairs(headers)}


def _texts(headers: Any) -> list[tuple[str, str]]:
    return [(name.decode(_TEXT), value.decode(_TEXT)) for name, value in headers]


def _pairs(headers: Any) -> list[tuple[bytes, bytes]]:
    return [(name.encode(_TEXT), value.encode(_TEXT)) for name, value in headers]
