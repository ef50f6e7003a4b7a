"""Listing a zip archive strictly, before torch opens it.

torch and Python read zip archives with different libraries, and a file may be built so that two
readers see two archives. So only the plain shape that torch.save writes is let through: entries
stored, one after another from the first byte, each local header naming what the directory names,
the directory at the very end.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from service.checkpoint.limits import ReadLimits, exceeded
from service.errors import (
    ChecksumMismatch,
    CompressedArchive,
    DuplicateKey,
    NotACheckpoint,
    PolyglotFile,
    TorchScriptArchive,
    TruncatedFile,
    UnsafeName,
    UnsupportedContainer,
)

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY_BYTES = 256  # generous for one directory entry of torch.save
_CHUNK_BYTES = 1 << 20
_ENCRYPTED = 0x1
_ODD_NAME = re.compile(r"[\x00-\x1f\x7f\\:]|(^|/)\.{0,2}(/|$)")


@dataclass(frozen=True)
class Archive:
    """A listed torch archive: by name below its one folder, each entry's place in the file.

    `kind` says who wrote it, going by the names: torch.save, or torch.export.save ("pt2").
    """

    path: Path
    kind: Literal["torch-zip", "pt2"]
    places: dict[str, tuple[int, int]]

    def size(self, name: str) -> int | None:
        """The entry's length in bytes, or None when there is no such entry."""
        place = self.places.get(name)
        return None if place is None else place[1]

    def read(self, name: str) -> bytes:
        """The bytes of one entry."""
        start, size = self.places[name]
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)


def list_archive(path: Path, limits: ReadLimits) -> Archive:
    """List the archive of torch.save or torch.export.save at `path`.

    Raises TruncatedFile when the directory at the end is missing, TorchScriptArchive,
    CompressedArchive or UnsupportedContainer for other zip archives, ArchiveBomb for too many
    entries or for entries that expand, PolyglotFile for bytes that the directory does not account
    for, DuplicateKey, UnsafeName, ChecksumMismatch, and NotACheckpoint for any other shape that
    torch does not write.
    """
    length = path.stat().st_size
    with open(path, "rb") as file:
        _check_directory_size(file, length, limits)
    try:
        with zipfile.ZipFile(path) as archive:
            infos, start_of_directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, EOFError) as error:
        raise TruncatedFile(f"The zip archive has no readable directory: {error}.") from None
    except (NotImplementedError, ValueError, OverflowError, struct.error) as error:
        raise NotACheckpoint(f"The zip archive is malformed: {error}.") from None
    kind = _kind([info.filename for info in infos])
    expanded = sum(info.file_size for info in infos)
    if expanded > limits.archive_expansion * length:
        found = f"The archive's {length} bytes expand to {expanded}"
        raise exceeded(limits, "archive_expansion", found)
    with open(path, "rb") as file:
        places = _check_layout(file, infos, start_of_directory)
        _check_sums(file, infos, places)
    roots = {name.split("/", 1)[0] for name in places}
    if len(roots) != 1:
        raise NotACheckpoint(f"The archive has {len(roots)} top folders; torch.save writes one.")
    return Archive(path, kind, {name.split("/", 1)[1]: place for name, place in places.items()})


def _check_directory_size(file: BinaryIO, length: int, limits: ReadLimits) -> None:
    """Bound the directory before it is read, from the end record that must close the file."""
    tail_bytes = min(length, _END.size + _END64_LOCATOR.size + _END64.size)
    file.seek(length - tail_bytes)
    tail = file.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        file.seek(max(0, length - (1 << 16) - _END.size))
        end = file.read()
        if 0 <= end.rfind(b"PK\5\6") <= len(end) - _END.size:
            raise PolyglotFile("Bytes follow the end of the zip archive.")
        raise TruncatedFile("The zip archive has no directory at its end.")
    entries, directory_bytes = _END.unpack(tail[-_END.size :])[4:6]
    locator = tail[: -_END.size][-_END64_LOCATOR.size :]
    if locator[:4] == b"PK\6\7":
        end64 = tail[: -_END.size - _END64_LOCATOR.size]
        if len(end64) < _END64.size or end64[:4] != b"PK\6\6":
            raise NotACheckpoint("The zip archive's 64-bit end record is not where it belongs.")
        entries, directory_bytes = _END64.unpack(end64)[7:9]
    if entries > limits.archive_entries or directory_bytes > _ENTRY_BYTES * limits.archive_entries:
        found = f"The archive lists {entries} entries in {directory_bytes} bytes"
        raise exceeded(limits, "archive_entries", found)
    # zipfile goes by the directory's length, and would make an object for every entry in it.
    file.seek(max(0, length - tail_bytes - directory_bytes))
    if file.read(directory_bytes + tail_bytes).count(b"PK\1\2") > 2 * entries + 64:
        raise PolyglotFile(f"The archive has more entries than the {entries} that it counts.")


def _kind(names: list[str]) -> Literal["torch-zip", "pt2"]:
    """Which archive this is; those that are not read get their own sentence."""
    below = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in below or any(name.startswith("code/") for name in below):
        raise TorchScriptArchive(
            "This is a TorchScript archive: it holds code, which is never run here.",
            container="torchscript",
        )
    if "archive_format" in below:
        return "pt2"
    if any(
        name.startswith(("models/", "serialized_exported_program")) or name == "model.json"
        for name in (*below, *names)
    ):
        raise UnsupportedContainer(
            "This is a torch.export archive (.pt2) of an older layout.",
            remedy="Load it where you trust it and save it again with torch 2.13, or upload the "
            "state dict: torch.save(torch.export.load(path).state_dict, 'weights.pth').",
            container="pt2",
        )
    if names and all(name.endswith(".npy") for name in names):
        raise UnsupportedContainer(
            "This is a numpy archive (.npz).",
            remedy="Load it, put the arrays in a state dict as tensors, and torch.save that.",
            container="npz",
        )
    if "data.pkl" not in below:
        raise NotACheckpoint("The file is a zip archive, but not one that torch.save wrote.")
    return "torch-zip"


def _check_layout(
    file: BinaryIO, infos: list[zipfile.ZipInfo], end: int
) -> dict[str, tuple[int, int]]:
    """Compare every local header with the directory, and see that the entries do not overlap.

    Returns where each entry's bytes start and how many they are, in the file's order.
    """
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        name = info.filename
        if name in places:
            raise DuplicateKey(f"The archive holds {name[:80]!r} twice.")
        # orig_filename is the name before zipfile cuts it at a NUL.
        whole = info.orig_filename
        if _ODD_NAME.search(whole) or not whole.isprintable() or "/" not in name:
            raise UnsafeName(f"The archive holds an entry named {whole[:80]!a}.")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CompressedArchive(
                f"The archive's entry {name[:80]!r} is compressed; torch.save never does that."
            )
        if info.flag_bits & _ENCRYPTED:
            raise CompressedArchive("The archive is encrypted.", remedy="Upload it unencrypted.")
        if not 0 <= info.header_offset < end:
            raise TruncatedFile(f"The archive's entry {name[:80]!r} lies beyond the file's end.")
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            raise TruncatedFile(f"The archive's entry {name[:80]!r} lies beyond the file's end.")
        magic, _, _, method, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        local = file.read(name_bytes)
        if magic != b"PK\3\4" or method != 0 or local != info.orig_filename.encode():
            raise PolyglotFile(f"The archive contradicts itself about {name[:80]!r}.")
        # A reader that finds entries by position may only meet what the directory lists: at most
        # a data descriptor (24 bytes) stands between two entries.
        if not position <= info.header_offset <= position + 24 * (position > 0):
            raise PolyglotFile("The archive holds bytes that its directory does not list.")
        start = info.header_offset + len(header) + name_bytes + extra_bytes
        places[name] = (start, info.file_size)
        position = start + info.file_size
        if position > end:
            raise TruncatedFile(f"The archive's entry {name[:80]!r} runs into the directory.")
    if end > position + 24:
        raise PolyglotFile("The archive holds bytes that its directory does not list.")
    return places


def _check_sums(
    file: BinaryIO, infos: list[zipfile.ZipInfo], places: dict[str, tuple[int, int]]
) -> None:
    """Compare every entry with its CRC-32, which torch.load never does.

    A sum of 0 stands for none: torch.serialization.set_crc32_options(False) writes it.
    """
    for info in infos:
        start, left = places[info.filename]
        file.seek(start)
        total = 0
        while left and info.CRC and (chunk := file.read(min(left, _CHUNK_BYTES))):
            total = zlib.crc32(chunk, total)
            left -= len(chunk)
        if total != info.CRC:
            raise ChecksumMismatch(
                f"The bytes of the archive's entry {info.filename[:80]!r} do not match their "
                "checksum: the file was damaged on its way."
            )
