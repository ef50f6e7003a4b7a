"""Damaging files at random, blindly and by their structure. The same number gives the same file."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from torch import nn

from service.graph import save_program, trace

from . import forge, tricks

_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
_BYTES = b"\0\1\x7f\x80\xff(.Rb0KMJXcQ]}ut)hq\x85\x86\x8a"
_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 1 << 31, 1 << 62, 1 << 70, 1.5, 1e999, "", "x", "F32", "\0", "\u202e"),
    *([], {}, [[]], [0, 1 << 40], {"ref": "x"}, {"as_int": -5}, {"as_none": True}, "aten.repeat"),
)


@functools.cache
def seeds() -> dict[str, bytes]:
    """One small honest file of each container."""
    state = OrderedDict(forge.small_state())
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    found = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "file"
        found["zip"] = forge.saved(path, {"state_dict": state, "epoch": 3}).read_bytes()
        found["legacy"] = forge.saved_legacy(path, state).read_bytes()
        found["pickle"] = pickle.dumps({"w": [1, 2.5, None, ("x", {3})]}, protocol=4)
        save_program(trace(net, (torch.randn(2, 3, 8, 8),)), path)
        found["bundle"] = path.read_bytes()
        header = {"__metadata__": {"format": "pt"}}
        position, data = 0, b""
        for key, value in state.items():
            raw = value.numpy().tobytes()
            kind = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}[value.dtype]
            header[key] = forge.entry(kind, list(value.shape), position, position + len(raw))
            position, data = position + len(raw), data + raw
        found["safetensors"] = forge.safetensors(path, header, data).read_bytes()
        with h5py.File(path, "w") as file:
            for key, value in state.items():
                file.create_dataset(key.replace(".", "/"), data=value.numpy())
        found["hdf5"] = path.read_bytes()
        tricks.pt2(lambda entries: entries)(path)
        found["pt2"] = path.read_bytes()
    return found


def mutant(files: dict[str, bytes], number: int) -> bytes:
    """The damaged file of this number."""
    chance = random.Random(number)
    name = chance.choice(sorted(files))
    data = files[name]
    by_structure = _BY_STRUCTURE.get(name, ())
    if by_structure and chance.random() < 0.5:
        try:
            return chance.choice(by_structure)(data, chance)
        except (ValueError, KeyError, IndexError):
            pass  # an edit that leaves nothing to edit
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_BLIND)(data, chance, files)
    return data


# ---- without looking ---------------------------------------------------------------------------

_Blind = Callable[[bytes, random.Random, dict[str, bytes]], bytes]


def _flip(data: bytes, chance: random.Random, _: object) -> bytes:
    out = bytearray(data)
    for _times in range(chance.randint(1, 8) if out else 0):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def _set(data: bytes, chance: random.Random, _: object) -> bytes:
    out = bytearray(data)
    if out:
        out[chance.randrange(len(out))] = chance.choice(_BYTES)
    return bytes(out)


def _cut(data: bytes, chance: random.Random, _: object) -> bytes:
    return data[: chance.randint(0, len(data))]


def _take_out(data: bytes, chance: random.Random, _: object) -> bytes:
    start = chance.randint(0, len(data))
    return data[:start] + data[start + chance.choice((1, 2, 4, 8, 30, 400)) :]


def _repeat(data: bytes, chance: random.Random, _: object) -> bytes:
    start = chance.randint(0, len(data))
    part = data[start : start + chance.choice((1, 4, 8, 40, 400))]
    return data[:start] + part * chance.choice((1, 1, 2, 50)) + data[start:]


def _splice(data: bytes, chance: random.Random, files: dict[str, bytes]) -> bytes:
    other = files[chance.choice(sorted(files))]
    return data[: chance.randint(0, len(data))] + other[chance.randint(0, len(other)) :]


def _number(data: bytes, chance: random.Random, _: object) -> bytes:
    """Overwrite what may be a length, an offset or a count."""
    size = chance.choice((2, 4, 8))
    if len(data) <= size:
        return data
    start = chance.randrange(len(data) - size)
    old = int.from_bytes(data[start : start + size], "little")
    new = chance.choice((*_NUMBERS, old + 1, old - 1, old * 2, len(data), len(data) + 1))
    return data[:start] + (new % (1 << 8 * size)).to_bytes(size, "little") + data[start + size :]


_BLIND: tuple[_Blind, ...] = (_flip, _set, _cut, _take_out, _repeat, _splice, _number, _number)


# ---- by structure ------------------------------------------------------------------------------

_Structured = Callable[[bytes, random.Random], bytes]


def _edit(document: Any, chance: random.Random) -> None:
    """Change one place of a JSON document."""
    value = document
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        inner = value[key]
        if isinstance(inner, (dict, list)) and inner and chance.random() < 0.8:
            value = inner
        elif chance.random() < 0.2:
            del value[key]
            return
        elif isinstance(value, dict) and chance.random() < 0.1:
            value[chance.choice(("", "x", "../w", "w\0", "\u202e", "y" * 600))] = inner
            return
        else:
            old = inner if type(inner) is int else 4
            value[key] = chance.choice((*_VALUES, old + 1, old - 1, old * 2, old << 20))
            return


def _edited_json(raw: bytes, chance: random.Random) -> bytes:
    document = json.loads(raw)
    for _ in range(chance.choice((1, 1, 2, 3))):
        _edit(document, chance)
    return json.dumps(document).encode()


def _header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with its JSON header changed and its length field kept right, or not."""
    size = int.from_bytes(data[:8], "little")
    header = _edited_json(data[8 : 8 + size], chance)
    claimed = len(header) if chance.random() < 0.9 else chance.choice(_NUMBERS)
    return claimed.to_bytes(8, "little") + header + data[8 + size :]


def _program(data: bytes, chance: random.Random) -> bytes:
    """A bundle with its program changed."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header["__metadata__"]
    metadata["foldserve.program"] = _edited_json(metadata["foldserve.program"], chance).decode()
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data[8 + size :]


def _pickle(data: bytes, chance: random.Random) -> bytes:
    """Instructions put in, taken out or repeated."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(2, len(out))
        match chance.randrange(4):
            case 0:
                out[place] = chance.choice(_BYTES)
            case 1:
                out[place:place] = bytes(chance.choices(_BYTES, k=chance.randint(1, 6)))
            case 2:
                del out[place : place + chance.randint(1, 6)]
            case _:
                other = chance.randrange(2, len(out))
                out[place:place] = out[other : other + chance.randint(1, 60)]
    return bytes(out)


def _in_archive(data: bytes, chance: random.Random) -> bytes:
    """An archive written anew, checksums right, with one entry changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    name = chance.choice([n for n in entries if n.endswith((".pkl", ".json"))])
    change = _pickle if name.endswith(".pkl") else _edited_json
    entries[name] = change(entries[name], chance)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for each, content in entries.items():
            file.writestr(each, content)
    return out.getvalue()


def _directory(data: bytes, chance: random.Random) -> bytes:
    """A field of an archive's directory, its end or a local header changed."""
    places = [i for i in range(len(data) - 4) if data[i : i + 2] == b"PK" and data[i + 2] < 8]
    start = chance.choice(places)
    field = start + chance.choice((4, 6, 8, 10, 14, 18, 20, 22, 24, 26, 28, 30, 32, 42))
    size = chance.choice((2, 4))
    out = bytearray(data)
    old = int.from_bytes(out[field : field + size], "little")
    new = chance.choice((*_NUMBERS, old + 1, old - 1, old ^ 8))
    out[field : field + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out)


def _fields(data: bytes, chance: random.Random) -> bytes:
    """Aligned numbers of an HDF5 file: addresses, sizes, counts, types of messages."""
    out = bytearray(data)
    used = [i for i in range(8, len(out) - 8, 2) if any(out[i : i + 8])]
    for _ in range(chance.randint(1, 3)):
        place, kind = chance.choice(used), chance.choice("HIQ")
        size = struct.calcsize(kind)
        (old,) = struct.unpack_from(f"<{kind}", out, place)
        new = chance.choice((*_NUMBERS, old + 1, old - 1, old + 8, chance.choice(used)))
        struct.pack_into(f"<{kind}", out, place, new % (1 << 8 * size))
    return bytes(out)


_BY_STRUCTURE: dict[str, tuple[_Structured, ...]] = {
    "safetensors": (_header,),
    "bundle": (_header, _program, _program),
    "pickle": (_pickle,),
    "legacy": (_pickle,),
    "zip": (_in_archive, _in_archive, _directory),
    "pt2": (_in_archive, _in_archive, _directory),
    "hdf5": (_fields,),
}
