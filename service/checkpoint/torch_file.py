"""Files of torch.save, zip and legacy: scanned first, then read by torch with weights_only."""

from __future__ import annotations

import io
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from service.checkpoint.archive import Archive
from service.checkpoint.limits import ReadLimits, exceeded
from service.checkpoint.pickle_policy import OPAQUE, OPAQUE_MAPPINGS
from service.checkpoint.pickle_scan import Scan, read_key_list, scan_pickle
from service.errors import (
    AliasBomb,
    NotACheckpoint,
    PolyglotFile,
    StrideBomb,
    TensorOutOfRange,
    TruncatedFile,
    UnsupportedContainer,
    out_of_memory,
)

_LEGACY_PICKLES_BEFORE = 3  # magic number, protocol version, system facts
_COUNT = struct.Struct("<q")


class _Opaque:
    """Stands for metadata that is not wanted; takes everything and keeps nothing."""

    def __new__(cls, *_arguments: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any) -> None:
        return

    def __setstate__(self, state: Any) -> None:
        return


class _OpaqueMapping:
    """The same for metadata with keys; torch only puts items into plain mappings."""

    def __new__(cls, *_arguments: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


_STAND_INS: list[Any] = [
    *((_Opaque, name) for name in sorted(OPAQUE)),
    *((_OpaqueMapping, name) for name in sorted(OPAQUE_MAPPINGS)),
]


def read_torch_zip(archive: Archive, limits: ReadLimits) -> Any:
    """The object in a zip file of torch.save, tensors on the CPU. Raises CheckpointError kinds."""
    pickle_bytes = archive.size("data.pkl")
    if pickle_bytes is None:
        raise NotACheckpoint("The archive has no data.pkl in its folder.")
    if pickle_bytes > limits.pickle_bytes:
        raise exceeded(limits, "pickle_bytes", f"The file's pickle has {pickle_bytes} bytes")
    if archive.size("byteorder") is not None:
        order = archive.read("byteorder")[:16]
        if order != sys.byteorder.encode():
            raise UnsupportedContainer(
                f"The file was saved on a {order.decode('ascii', 'replace')}-endian machine.",
                remedy="Load it there and save it as safetensors.",
            )
    scan = scan_pickle(io.BytesIO(archive.read("data.pkl")), limits)
    for storage in scan.storages.values():
        record = archive.size(f"data/{storage.key}")
        if record is None:
            raise TruncatedFile(f"The archive has no record for storage {storage.key[:40]!r}.")
        if storage.bytes > record:
            raise TensorOutOfRange(
                f"Storage {storage.key[:40]!r} claims {storage.bytes} bytes; its record has "
                f"{record}."
            )
    _check_expansion(scan, archive.path, limits)
    return _load(archive.path, mapped=True)


def read_torch_legacy(path: Path, limits: ReadLimits) -> Any:
    """The object in a file of torch.save before 1.6, tensors on the CPU."""
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(limits.pickle_bytes))
        try:
            for _ in range(_LEGACY_PICKLES_BEFORE):
                scan_pickle(head, limits)
            scan = scan_pickle(head, limits)
            keys = read_key_list(head, limits)
        except TruncatedFile:
            if len(head.getbuffer()) < limits.pickle_bytes:
                raise
            raise exceeded(limits, "pickle_bytes", "The file's pickle has more bytes") from None
        # torch leaves a storage that the list forgets as it was allocated: with old memory in it.
        if sorted(keys) != sorted(scan.storages):
            raise NotACheckpoint("The list of storages is not that of the pickle.")
        file.seek(head.tell())
        _check_legacy_storages(file, path.stat().st_size, scan)
    _check_expansion(scan, path, limits)
    return _load(path, mapped=False)


def refuse_bare_pickle(path: Path, limits: ReadLimits) -> None:
    """Say what is wrong with a pickle that torch.save did not write. Always raises."""
    with open(path, "rb") as file:
        head = io.BytesIO(file.read(limits.pickle_bytes))
    scan_pickle(head, limits, other_protocols=True)
    raise UnsupportedContainer(
        "This is a plain pickle, not a file of torch.save.",
        remedy="Put the arrays in a state dict as tensors and torch.save that.",
        container="pickle",
    )


def _check_legacy_storages(file: BinaryIO, length: int, scan: Scan) -> None:
    """Walk the storages after the pickles: a count, then the elements, to the file's end.

    torch allocates each storage as large as the pickle says before it reads the count, so the
    sum is compared first.
    """
    claimed = sum(storage.bytes + _COUNT.size for storage in scan.storages.values())
    present = length - file.tell()
    if claimed > present:
        raise TruncatedFile(f"The file's storages need {claimed} bytes; {present} follow.")
    if claimed < present:
        raise PolyglotFile(f"{present - claimed} bytes follow the last storage.")


def _check_expansion(scan: Scan, path: Path, limits: ReadLimits) -> None:
    length = path.stat().st_size
    if scan.tensor_bytes > limits.tensor_expansion * length:
        found = f"The tensors of the {length} byte file spread over {scan.tensor_bytes} bytes"
        # One tensor that repeats its own elements, or several over the same ones.
        kind = StrideBomb if 2 * scan.repeated_bytes > scan.tensor_bytes else AliasBomb
        raise exceeded(limits, "tensor_expansion", found, kind)


def _load(path: Path, *, mapped: bool) -> Any:
    """torch's own reading. Mapped tensors stay in the file until they are used."""
    # By its path torch takes a file of this name for safetensors, whatever it holds.
    mapped = mapped and not path.name.endswith(".safetensors")
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(_STAND_INS):
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        if out_of_memory(error):
            raise
        first = str(error).strip().split("\n", 1)[0][:200]
        raise NotACheckpoint(f"torch.load refuses the file: {first}") from None
