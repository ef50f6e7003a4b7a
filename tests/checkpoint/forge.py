"""Files as people and attackers make them."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.checkpoint import Checkpoint, ReadLimits, read_checkpoint

MIB = 1 << 20


def small_state() -> dict[str, Tensor]:
    """A state dict with float, integer and boolean entries, the same at every call."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    return {**net.state_dict(), "mask": torch.tensor([True, False])}


def saved(path: Path, content: object, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


def saved_legacy(path: Path, content: object) -> Path:
    return saved(path, content, _use_new_zipfile_serialization=False)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read(path: Path, **limits: Any) -> Checkpoint:
    return read_checkpoint(path, ReadLimits(**limits))


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(
        state[key].dtype == value.dtype and torch.equal(state[key], value)
        for key, value in expected.items()
    )


# ---- pickles, instruction by instruction -------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tuple_(items: Iterable[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(key: str, count: int, kind: str = "FloatStorage", *, legacy: bool = False) -> bytes:
    parts = [text("storage"), global_("torch", kind), text(key), text("cpu"), integer(count)]
    return tuple_(parts + [b"N"] * legacy) + b"Q"


def tensor(source: bytes, size: Iterable[int], stride: Iterable[int], offset: int = 0) -> bytes:
    hooks = global_("collections", "OrderedDict") + b")R"
    arguments = [
        *(source, integer(offset), tuple_(map(integer, size)), tuple_(map(integer, stride))),
        *(b"\x89", hooks),
    ]
    return global_("torch._utils", "_rebuild_tensor_v2") + tuple_(arguments) + b"R"


def state_pickle(entries: dict[str, bytes]) -> bytes:
    items = b"".join(text(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


# ---- archives ----------------------------------------------------------------------------------


def archive(
    path: Path,
    pickle_data: bytes,
    records: dict[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    extra: Iterable[tuple[str, bytes]] = (),
) -> Path:
    """A zip file like torch.save's with any pickle and any records (`data/0`, ...)."""
    entries = [("data.pkl", pickle_data), ("byteorder", b"little")]
    entries += [(f"data/{key}", data) for key, data in (records or {}).items()]
    entries += [("version", b"3\n")]
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in entries:
            file.writestr(f"archive/{name}", data)
        for name, data in extra:
            file.writestr(name, data)
    return path


def legacy(path: Path, main: bytes, keys: list[str], tail: bytes) -> Path:
    """A file like torch.save's before 1.6 with any main pickle and any bytes after the keys."""
    out = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
        pickle.dump(value, out, protocol=2)
    out.write(main)
    pickle.dump(keys, out, protocol=2)
    out.write(tail)
    return written(path, out.getvalue())


# ---- safetensors -------------------------------------------------------------------------------


def safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header: an object for JSON, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written(path, len(raw).to_bytes(8, "little") + raw + data)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
