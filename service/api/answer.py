"""The answers of the hot routes."""

from __future__ import annotations

from functools import lru_cache

from starlette.responses import Response

_KNOWN_HEADS = 1024


class Answer(Response):
    """A response of status 200 whose headers are put together once for all that are alike.

    To encode and look through them anew takes starlette longer than the rest of the response.
    """

    def __init__(
        self, content: bytes, media_type: str, headers: tuple[tuple[str, str], ...]
    ) -> None:
        self.status_code = 200
        self.background = None
        self.body = content
        self.raw_headers = [
            *_encoded(media_type, headers),
            (b"content-length", b"%d" % len(content)),
        ]


@lru_cache(_KNOWN_HEADS)
def _encoded(media_type: str, headers: tuple[tuple[str, str], ...]) -> list[tuple[bytes, bytes]]:
    fields = (("content-type", media_type), *headers)
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in fields]
