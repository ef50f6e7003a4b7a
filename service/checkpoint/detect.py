"""What a file is, from its first bytes alone; its name says nothing."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from service.checkpoint.polyglot import check_one_file
from service.errors import EmptyFile, NotACheckpoint, UnsupportedContainer

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle of a file that torch.save wrote before version 1.6: one fixed number."""

_HEAD_BYTES = 512


class Kind(Enum):
    """The containers that have a reader."""

    SAFETENSORS = "safetensors"
    ZIP = "zip"
    TORCH_LEGACY = "torch-legacy"
    BARE_PICKLE = "pickle"
    HDF5 = "hdf5"


# Formats that do hold weights, with what to do about each.
_UNREAD: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "Unpack it with gunzip and upload what is inside."),
    (b"BZh", "bzip2", "Unpack it with bunzip2 and upload what is inside."),
    (b"\xfd7zXZ\0", "xz", "Unpack it with unxz and upload what is inside."),
    (b"\x28\xb5\x2f\xfd", "zstd", "Unpack it with unzstd and upload what is inside."),
    (b"7z\xbc\xaf\x27\x1c", "7-zip", "Unpack it and upload what is inside."),
    (b"\x93NUMPY", "numpy array", "Load it, put the arrays in a state dict, torch.save that."),
    (b"GGUF", "GGUF", "Upload the PyTorch checkpoint that it was made from."),
)

# Files that are something else altogether.
_ALIEN: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a RIFF file (WebP, WAV or AVI)"),
    (b"BM", "a BMP image"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "an executable"),
    (b"MZ", "an executable"),
    (b"SQLite format 3\0", "a SQLite database"),
    (b"PK\x05\x06", "an empty zip archive"),
)


def detect(path: Path) -> Kind:
    """The kind of container at `path`.

    Raises EmptyFile, PolyglotFile for a file that is a zip archive to who reads it from its end,
    UnsupportedContainer for formats of weights that have no reader, and NotACheckpoint, saying
    what the file seems to be, for everything else.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        raise EmptyFile("The file has no bytes.")
    if head.startswith(b"PK\x03\x04"):
        return Kind.ZIP
    check_one_file(path)
    if head.startswith(LEGACY_MAGIC):
        return Kind.TORCH_LEGACY
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return Kind.HDF5
    if (head[8:9] == b"{" and head[4:8] == b"\0\0\0\0") or head[8:10] in (b'{"', b"{}"):
        return Kind.SAFETENSORS
    for magic, name, remedy in _UNREAD:
        if head.startswith(magic):
            raise UnsupportedContainer(f"This is a {name} file.", remedy=remedy, container=name)
    if head[257:262] == b"ustar":
        raise UnsupportedContainer(
            "This is a tar archive.", remedy="Unpack it and upload the checkpoint inside."
        )
    for magic, name in _ALIEN:
        if head.startswith(magic):
            raise NotACheckpoint(f"The file is {name}.")
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return Kind.BARE_PICKLE
    if head[0] == 0x08 and b"\x12" in head[1:4] and b"onnx" in head[:64].lower():
        raise UnsupportedContainer(
            "This is an ONNX model.", remedy="Upload the PyTorch checkpoint that it was made from."
        )
    raise NotACheckpoint(_describe(head))


def _describe(head: bytes) -> str:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # The cut may have split the last character.
        text = head[: error.start].decode() if error.start > len(head) - 4 else ""
    if not text or any(ord(c) < 32 and c not in "\t\n\r\f" for c in text):
        return f"Its first bytes, {head[:8].hex(' ')}, begin no known checkpoint format."
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith("version https://git-lfs"):
        return "The file is a Git LFS pointer; the checkpoint itself was not downloaded."
    if start.startswith(("<!doctype html", "<html")):
        return "The file is an HTML page, often an error or login page saved instead of a download."
    if start.startswith(("{", "[")):
        return "The file is JSON text."
    return "The file is text."
