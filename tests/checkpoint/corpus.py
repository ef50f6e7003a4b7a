"""More than 200 crafted files: the known tricks, and each family of tricks in every container."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from . import forge, tricks
from .forge import archive, entry, global_, legacy, state_pickle
from .tricks import TRICKS, Make, Trick

GLOBALS = (
    *("os system", "posix system", "nt system", "subprocess Popen", "subprocess check_output"),
    *("builtins eval", "builtins exec", "builtins getattr", "builtins __import__"),
    *("builtins bytearray", "__builtin__ apply", "__builtin__ compile", "__builtin__ open"),
    *(
        "operator attrgetter",
        "operator methodcaller",
        "functools partial",
        "importlib import_module",
    ),
    *("runpy run_path", "code InteractiveInterpreter", "pty spawn", "socket socket"),
    *("webbrowser open", "shutil rmtree", "tempfile mktemp", "pickle loads", "_pickle loads"),
    *("torch load", "torch.hub load", "torch.jit load", "torch.storage _load_from_bytes"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_wrapper_subclass"),
    *("torch._utils _rebuild_qtensor", "torch._tensor _rebuild_from_type_v2", "torch Tensor"),
    *("numpy load", "numpy.testing._private.utils runstring", "pip main", "asyncio run"),
    *("ctypes CDLL", "sys setrecursionlimit", "signal raise_signal", "collections Counter"),
)
INVISIBLE = ("\0", "\n", "\x1b", "\x7f", "\u061c", "\u200e", "\u200f", "\u202a", "\u202e", "\u2066")
PATHS = ("../w", "/etc/w", "a/../w", "a\\w", "./w", "a/..", "C:\\w")
SAVES: dict[str, Callable[[Path, dict[str, Tensor]], object]] = {
    "zip": forge.saved,
    "legacy": forge.saved_legacy,
    "safetensors": lambda path, state: saved_safetensors(path, state),
    "hdf5": lambda path, state: saved_hdf5(path, state),
}


def saved_safetensors(path: Path, state: dict[str, Tensor]) -> None:
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
    header: dict[str, Any] = {}
    data = b""
    for key, value in state.items():
        raw = value.numpy().tobytes()
        header[key] = entry(kinds[value.dtype], list(value.shape), len(data), len(data) + len(raw))
        data += raw
    forge.safetensors(path, header, data)


def saved_hdf5(path: Path, state: dict[str, Tensor]) -> None:
    with h5py.File(path, "w") as file:
        for key, value in state.items():
            # Flat, whatever the name: below the high-level interface a slash would make groups.
            file.create_dataset(key.encode("utf-8", "surrogatepass"), data=value.numpy())


def crafted() -> Iterator[Trick]:
    """Every crafted file with the code that it is refused with."""
    yield from TRICKS
    yield from _globals()
    yield from _names()
    yield from _values()
    yield from _headers()
    yield from _polyglots()
    yield from _pickles()


def _globals() -> Iterator[Trick]:
    def main(name: str) -> bytes:
        return state_pickle({"w": global_(*name.split(" ")) + b")R"})

    for name in GLOBALS:
        yield Trick(f"zip naming {name}", "unsafe_pickle", _archived(main(name)))
    for name in GLOBALS[:20]:
        yield Trick(f"legacy naming {name}", "unsafe_pickle", _legacy(main(name)))
        yield Trick(f"bare pickle naming {name}", "unsafe_pickle", _written(main(name)))


def _archived(data: bytes) -> Make:
    return lambda path: archive(path, data, {"0": bytes(4)})


def _legacy(data: bytes) -> Make:
    return lambda path: legacy(path, data, [], b"")


def _written(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def _state(save: str, state: dict[str, Tensor]) -> Make:
    return lambda path: SAVES[save](path, state)


def _names() -> Iterator[Trick]:
    for save in ("zip", "legacy", "safetensors"):
        for odd in INVISIBLE:
            state = {f"w{odd}x": torch.ones(2)}
            yield Trick(f"{save} key with {odd!a}", "unsafe_name", _state(save, state))
        for odd in PATHS:
            yield Trick(f"{save} key {odd}", "unsafe_name", _state(save, {odd: torch.ones(2)}))
        long = {"k" * 600: torch.ones(2)}
        yield Trick(f"{save} key of 600 characters", "limit_exceeded", _state(save, long))
    for odd in INVISIBLE[1:]:
        state = {f"w{odd}x": torch.ones(2)}
        yield Trick(f"hdf5 key with {odd!a}", "unsafe_name", _state("hdf5", state))
    for odd in INVISIBLE[1:]:
        yield Trick(
            f"zip entry with {odd!a}", "unsafe_name", tricks.named_entry(f"archive/a{odd}b")
        )


def _values() -> Iterator[Trick]:
    for save in SAVES:
        for kind in (torch.float64, torch.float32, torch.float16):
            for bad in (math.nan, math.inf, -math.inf):
                state = {"w": torch.tensor([1.0, bad], dtype=kind)}
                yield Trick(f"{save} {kind} {bad}", "non_finite_weights", _state(save, state))
        state = {"bn.running_var": torch.tensor([0.5, -1e-6])}
        yield Trick(f"{save} negative running_var", "negative_variance", _state(save, state))


def _headers() -> Iterator[Trick]:
    good = entry("F32", [1], 0, 4)
    rows: list[tuple[str, object]] = [
        ("not_a_checkpoint", {"a": [1]}),
        ("not_a_checkpoint", {"a": {**good, "x": 1}}),
        ("not_a_checkpoint", {"a": entry("F32", [-1], 0, 4)}),
        ("not_a_checkpoint", {"a": entry("F32", [1 << 63], 0, 4)}),
        ("not_a_checkpoint", {"a": {**good, "data_offsets": [0.0, 4.0]}}),
        ("not_a_checkpoint", {"a": {**good, "data_offsets": [0, "4"]}}),
        ("not_a_checkpoint", {"a": {**good, "shape": [True]}}),
        ("not_a_checkpoint", {"__metadata__": {"a": 1}, "a": good}),
        ("not_a_checkpoint", b'{"a": Infinity}'),
        ("not_a_checkpoint", b'{"a": ' + b"9" * 5000 + b"}"),
        ("not_a_checkpoint", b'{"a"'),
        ("duplicate_key", b'{"a":{"dtype":"F32","dtype":"F64"}}'),
        ("unsupported_container", {"a": entry("F4", [2], 0, 4)}),
        ("tensor_out_of_range", {"a": entry("F32", [1], 4, 0)}),
        ("tensor_out_of_range", {"a": entry("F32", [2], 0, 4)}),
        ("polyglot_file", {"a": entry("F32", [0], 0, 0)}),
        ("no_state_dict", {}),
    ]
    for number, (code, header) in enumerate(rows):
        data = b"" if code == "no_state_dict" else bytes(4)
        yield Trick(
            f"safetensors header {number}",
            code,
            lambda path, header=header, data=data: forge.safetensors(path, header, data),  # type: ignore[misc]
        )


def _polyglots() -> Iterator[Trick]:
    fronts = (
        b"GIF89a",
        b"%PDF-1.7\n",
        b"\x7fELF",
        b"MZ",
        b"#!/bin/sh\n",
        b"<html>",
        b"\x1f\x8b\x08",
    )

    def behind(front: bytes, path: Path) -> None:
        archive(path, state_pickle(tricks.PLAIN), {"0": bytes(4)})
        path.write_bytes(front + bytes(30) + path.read_bytes())

    for front in fronts:
        yield Trick(
            f"zip behind {front[:6]!r}",
            "polyglot_file",
            lambda path, front=front: behind(front, path),  # type: ignore[misc]
        )
    for save in ("zip", "legacy", "safetensors", "hdf5"):
        for tail in (b"\0", b"<script>", bytes(60_000)):
            make = tricks.appended(_state(save, {"w": torch.ones(2)}), tail)
            yield Trick(f"{save} with {len(tail)} bytes behind it", "polyglot_file", make)


def _pickles() -> Iterator[Trick]:
    for protocol in range(2, 5):
        data = pickle.dumps({"w": np.ones(3)}, protocol=protocol)
        yield Trick(f"bare pickle {protocol}", "unsupported_container", _written(data))
    for depth in (101, 1_000, 50_000):
        nested = b"]" * depth + b"a" * (depth - 1)
        yield Trick(
            f"lists {depth} deep", "nesting_too_deep", _archived(state_pickle({"x": nested}))
        )
