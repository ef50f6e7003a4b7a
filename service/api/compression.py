"""Compressed bodies, both ways: gzip and deflate, expanded no further than a limit."""

from __future__ import annotations

import zlib
from typing import Final

from service.errors import BadInput, UnsupportedMediaType

_WINDOW: Final = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_PIECE: Final = 1 << 20
_LEVEL: Final = 1  # tensors hardly shrink further, and higher levels take several times as long


def content_coding(header: str | None) -> str | None:
    """The coding that a Content-Encoding header names; None for none.

    Raises UnsupportedMediaType for any other than gzip and deflate, and for several at once.
    """
    coding = (header or "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding in _WINDOW:
        return coding
    raise UnsupportedMediaType(
        f"The body has the Content-Encoding {coding[:40]!r}.", remedy="Use gzip, deflate, or none."
    )


def accepted_coding(header: str | None) -> str | None:
    """The coding to answer in: the one that Accept-Encoding names, if it names one alone.

    HTTP libraries send a list of all that they know with every request. To compress for them all
    would cost most clients more time than the transfer; whoever names one coding means it.
    """
    coding = (header or "").strip().lower()
    return coding if coding in _WINDOW else None


class TooMuch(Exception):
    """A compressed body expands to more than its limit."""


def expand(body: bytes | bytearray | memoryview, coding: str, limit: int) -> bytearray:
    """The expanded body; never more than `limit` bytes and a piece are held.

    Raises TooMuch, or BadInput for a body that is damaged, cut short or followed by other bytes.
    """
    expanded = bytearray()
    engine = zlib.decompressobj(wbits=_WINDOW[coding])
    rest: bytes | memoryview = memoryview(body)
    try:
        while not engine.eof:
            piece = engine.decompress(rest, _PIECE)
            rest = engine.unconsumed_tail
            expanded += piece
            if len(expanded) > limit:
                raise TooMuch
            if not piece and not rest and not engine.eof:
                raise _damaged("it is cut short")
    except zlib.error as error:
        raise _damaged(str(error)) from None
    if engine.unused_data:
        raise _damaged("something follows its end")
    return expanded


def _damaged(reason: str) -> BadInput:
    return BadInput(
        f"The compressed body cannot be read: {reason}.",
        remedy="Compress the whole body once, as Content-Encoding says.",
    )


def compress(pieces: list[bytes | memoryview], coding: str) -> bytes:
    """The pieces as one compressed body."""
    engine = zlib.compressobj(_LEVEL, wbits=_WINDOW[coding])
    return b"".join([*(engine.compress(piece) for piece in pieces), engine.flush()])
