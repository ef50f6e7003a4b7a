"""Responses whose headers are known: to work them out costs starlette more than what they say."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from starlette.responses import Response

Headers = tuple[tuple[str, str], ...]
_KNOWN_HEADS = 1024


class KnownResponse(Response):
    """A whole response; what is alike in many of them is encoded once.

    `headers` are few and alike, `own` those that differ from one response to the next.
    """

    def __init__(
        self,
        content: bytes,
        media_type: str,
        headers: Headers = (),
        own: Iterable[tuple[str, str]] = (),
        status: int = 200,
    ) -> None:
        self.status_code = status
        self.background = None
        self.body = content
        self.raw_headers = [
            *_alike(media_type, headers),
            *map(_encoded, own),
            (b"content-length", b"%d" % len(content)),
        ]


@lru_cache(_KNOWN_HEADS)
def _alike(media_type: str, headers: Headers) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(map(_encoded, (("content-type", media_type), *headers)))


def _encoded(header: tuple[str, str]) -> tuple[bytes, bytes]:
    return header[0].lower().encode("latin-1"), header[1].encode("latin-1")


class MadeResponse(Response):
    """A whole response whose headers are the `lines` already that are sent."""

    def __init__(self, status: int, lines: bytes, content: bytes) -> None:
        self.status_code = status
        self.background = None
        self.body = content
        self.lines = lines

    @property
    def raw_headers(self) -> list[tuple[bytes, bytes]]:  # type: ignore[override]
        """The headers one by one, for where lines are of no use."""
        fields = (line.partition(b": ") for line in self.lines.split(b"\r\n")[:-1])
        return [(name, value) for name, _, value in fields]
