"""Files that are one thing to who reads from the front and another to who reads from the back.

A zip archive is found from its end, so it can follow any other format in the same file. Scanners
and people then see one of the two, and the next program opens the other.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from service.errors import PolyglotFile

_END = struct.Struct("<4s4H2LH")
_MAX_COMMENT = (1 << 16) - 1


def check_one_file(path: Path) -> None:
    """Raises PolyglotFile when a file that does not begin as a zip archive ends as one.

    By chance alone four given bytes would have to be followed by a length that fits to the byte
    and to point at four more: no honest weights do.
    """
    length = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, length - _MAX_COMMENT - _END.size))
        tail = file.read()
        found = tail.rfind(b"PK\5\6")
        while found >= (1 if len(tail) == length else 0):
            if _ends_here(tail[found:]) and _directory_before(
                file.fileno(), tail[found:], length - (len(tail) - found)
            ):
                raise PolyglotFile("The file begins as something else and ends as a zip archive.")
            found = tail.rfind(b"PK\5\6", 0, found)


def _ends_here(record: bytes) -> bool:
    """Whether an end record with its comment reaches to the end of the file."""
    if len(record) < _END.size:
        return False
    comment: int = _END.unpack_from(record)[7]
    return len(record) == _END.size + comment


def _directory_before(descriptor: int, record: bytes, position: int) -> bool:
    """Whether a directory, or the locator of a 64-bit one, stands right before the end record."""
    size: int = _END.unpack_from(record)[5]
    if os.pread(descriptor, 4, max(0, position - 20)) == b"PK\6\7":
        return True
    return size == 0 or (size <= position and os.pread(descriptor, 4, position - size) == b"PK\1\2")
