"""What goes out and comes back: uploads that are counted, images and arrays, events."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from service.errors import BadInput

if TYPE_CHECKING:
    from service.client.types import Input, Json, Rows, Transferred

NPY = "application/x-npy"
_IMAGES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}


class Counted(io.RawIOBase):
    """A file that tells how much of it was read; httpx rewinds it when a request is repeated."""

    def __init__(self, file: BinaryIO, progress: Transferred | None) -> None:
        self._file = file
        self._progress = progress
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, -1 for all; `progress` is told the position and the length."""
        data = self._file.read(size)
        if self._progress is not None and data:
            self._progress(self._file.tell(), self._size)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move in the file itself, as for a repeated request; the new position in bytes."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position in the file, which is how many bytes were sent since it was last rewound."""
        return self._file.tell()

    def readable(self) -> bool:
        """True: this is for sending, whatever the wrapped file says."""
        return True

    def seekable(self) -> bool:
        """True: the wrapped file was already sought to learn its length."""
        return True


class EventDecoder:
    """Server-sent events from lines (WHATWG HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def line(self, line: str) -> Json | None:
        """The event that this line completes, if any."""
        if not line:
            fields, self._fields = self._fields, {}
            if "data" not in fields:
                return None
            return {
                "id": int(fields.get("id", 0)),
                "event": fields.get("event", "message"),
                "data": json.loads(fields["data"]),
            }
        name, _, value = line.partition(":")
        if name:
            self._fields[name] = value.removeprefix(" ")
        return None


def npy_of(array: Any) -> bytes:
    """A float32 array as the bytes of a .npy file."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def calibration_of(given: Rows) -> bytes:
    """The bytes of a .npy file, from its path, from an array, or as they are."""
    if isinstance(given, bytes):
        return given
    return Path(given).read_bytes() if isinstance(given, str | Path) else npy_of(given)


def body_of(given: Input) -> Json:
    """Content and headers for an array, one image, or several."""
    if hasattr(given, "__array_interface__") and hasattr(given, "ndim"):
        return {"content": npy_of(given), "headers": {"Content-Type": NPY}}
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        parts = []
        for number, one in enumerate(given):
            data = _image_bytes(one)
            parts.append(("image", (f"{number}", data, _image_type(data))))
        return {"files": parts}
    data = _image_bytes(given)
    return {"content": data, "headers": {"Content-Type": _image_type(data)}}


def _image_bytes(picture: Any) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return Path(picture).read_bytes()
    if hasattr(picture, "save") and hasattr(picture, "mode"):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")  # lossless: the service sees the very pixels
        return buffer.getvalue()
    raise BadInput(
        f"{type(picture).__name__} is no input.",
        remedy="Give a path, the bytes of an image file, a PIL image, or a NumPy array.",
    )


def _image_type(data: bytes) -> str:
    return _IMAGES.get(data[:2], "application/octet-stream")
