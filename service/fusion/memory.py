"""Giving freed memory back while kernels are computed.

The C library keeps freed blocks of this size for later and finds them too scattered to use again,
so that many kernels of a few megabytes leave several times their sum behind. `malloc_trim` returns
the free pages; where the C library has none, nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

EVERY = 16 << 20
"""Bytes of intermediate results after which free pages are returned."""


def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


_malloc_trim = _trim()


class Trimmer:
    """Counts intermediate results and returns free pages now and then."""

    def __init__(self) -> None:
        self._pending = 0

    def made(self, size: int) -> None:
        """Note that `size` bytes were allocated for a while."""
        self._pending += size
        if self._pending >= EVERY:
            self._pending = 0
            if _malloc_trim is not None:
                _malloc_trim(0)
