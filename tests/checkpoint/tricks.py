"""The known tricks, each as a file and with the code that refuses it.

`docs/security.md` shows this table, and a test compares the two.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn

from tests.graph import archives

from . import forge
from .forge import (
    MIB,
    archive,
    entry,
    global_,
    state_pickle,
    storage,
    tensor,
    tuple_,
)

Make = Callable[[Path], object]


@dataclass(frozen=True)
class Trick:
    """What a file does, the code that it is refused with, and how to make it at a path."""

    what: str
    code: str
    make: Make


class Evil:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch owned",)


def weight(size: list[int], stride: list[int], count: int) -> bytes:
    return tensor(storage("0", count), size, stride)


def zipped(entries: dict[str, bytes], record: bytes = bytes(4)) -> Make:
    return lambda path: archive(path, state_pickle(entries), {"0": record})


PLAIN = {"w": weight([1], [1], 1)}


def with_entry(value: bytes) -> Make:
    """A good state dict with one more entry, given as pickle instructions."""
    return zipped({**PLAIN, "x": value})


def huge(value: int) -> bytes:
    data = value.to_bytes(16, "little")
    return b"\x8a\x10" + data


def memo(number: int) -> bytes:
    return b"q" + bytes([number])


# ---- the bytes of each trick -------------------------------------------------------------------


def deflated(path: Path) -> None:
    archive(path, state_pickle(PLAIN), {"0": bytes(64 * MIB)}, compression=zipfile.ZIP_DEFLATED)


def aliasing(path: Path) -> None:
    part = weight([MIB], [1], MIB)
    entries = {f"w{index}": part for index in range(5_250)}
    archive(path, state_pickle(entries), {"0": bytes(4 * MIB)})


def slightly_deflated(path: Path) -> None:
    record = {"0": os.urandom(400)}
    archive(path, state_pickle({"w": weight([100], [1], 100)}), record, compression=8)


def shared_tuple_key(path: Path) -> None:
    """A tuple of two of a tuple of two of ...: 60 instructions, hashed in 2**60 steps."""
    doubled = b"N" + b"".join(memo(i) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    archive(path, b"\x80\x02}" + doubled + b"Ns.", {"0": bytes(4)})


def colliding_keys(path: Path) -> None:
    """Keys that all have the hash 0: a mapping of n takes n**2 comparisons."""
    keys = b"".join(huge(index * (2**61 - 1)) + b"N" for index in range(40_000))
    archive(path, b"\x80\x02}(" + keys + b"u.", {"0": bytes(4)})


def copied_again_and_again(path: Path) -> None:
    """One list of 50,000 numbers, made a set 50,000 times: 6 bytes each."""
    numbers = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(50_000)) + b"e\x85"
    head = b"\x80\x02(" + global_("builtins", "set") + memo(0) + numbers + memo(1)
    archive(path, head + b"h\0h\1R" * 50_000 + b"t.", {"0": bytes(4)})


def endless(path: Path) -> None:
    archive(path, b"\x80\x02(" + b"N" * 2_000_001 + b"t.", {"0": bytes(4)})


def many_calls(path: Path) -> None:
    head = b"\x80\x02(" + global_("collections", "OrderedDict") + memo(0)
    archive(path, head + b"h\0)R" * 400_000 + b"t.", {"0": bytes(4)})


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(path))


def whole_module(path: Path) -> None:
    forge.saved(path, {"model": nn.Sequential(nn.Linear(1, 1))})


def png_and_zip(path: Path) -> None:
    archive(path, state_pickle(PLAIN), {"0": bytes(4)})
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40) + path.read_bytes())


def zip_in_safetensors(path: Path) -> None:
    archive(path, state_pickle(PLAIN), {"0": bytes(4)})
    inner = path.read_bytes()
    forge.safetensors(path, {"w": entry("U8", [len(inner)], 0, len(inner))}, inner)


def appended(make: Make, tail: bytes = b"#!/bin/sh\n" * 6) -> Make:
    def write(path: Path) -> None:
        make(path)
        path.write_bytes(path.read_bytes() + tail)

    return write


def two_directories(path: Path) -> None:
    archive(path, state_pickle(PLAIN), {"0": bytes(4)})
    data = path.read_bytes().replace(b"archive/data/0", b"archive/data/9", 1)
    path.write_bytes(data)


def named_entry(name: str) -> Make:
    return lambda path: archive(path, state_pickle(PLAIN), {"0": bytes(4)}, extra=[(name, b"x")])


def nul_in_entry(path: Path) -> None:
    named_entry("archive/goodXbad")(path)
    path.write_bytes(path.read_bytes().replace(b"goodXbad", b"good\0bad"))


def twice_in_zip(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        named_entry("archive/data.pkl")(path)


def state(**values: torch.Tensor) -> Make:
    return lambda path: forge.saved(path, dict(values))


def language_model(path: Path) -> None:
    layer = {f"layers.0.self_attn.{p}_proj.weight": torch.zeros(8, 8) for p in "qkvo"}
    words = {"embed_tokens.weight": torch.zeros(100, 8), "lm_head.weight": torch.zeros(100, 8)}
    forge.saved(path, {f"model.{key}": value for key, value in {**words, **layer}.items()})


def optimizer(path: Path) -> None:
    net = nn.Linear(2, 2)
    forge.saved(path, torch.optim.Adam(net.parameters()).state_dict())


def hdf5(write: Callable[[Any], object]) -> Make:
    def make(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.create_dataset("ok", data=np.ones(4, "f4"))
            write(file)

    return make


def many_links(file: Any) -> None:
    for index in range(10_000):
        file[f"w{index}"] = file["ok"]


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "secret", (4,))
    file.create_virtual_dataset("w", layout)


def plugin(file: Any) -> None:
    """A filter that the library would look for in a folder of plug-ins."""
    kind = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    kind.set_chunk((4,))
    kind.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL, (1,))
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file.id, b"w", h5py.h5t.IEEE_F32LE, space, kind)


def many_names(file: Any) -> None:
    file.create_dataset("w0", data=np.ones(4096, "f4"))
    for index in range(1, 100):
        file[f"w{index}"] = file["w0"]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.c(x))


_honest: dict[str, bytes] = {}


def honest_pt2() -> dict[str, bytes]:
    """The entries of a real export, made once."""
    if not _honest:
        folder = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = archives.exported(_Net(), torch.zeros(2, 3, 8, 8))
            torch.export.save(program, folder)
        with zipfile.ZipFile(folder) as file:
            for info in file.infolist():
                _honest[info.filename.split("/", 1)[1]] = file.read(info)
    return dict(_honest)


def pt2(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Make:
    return lambda path: archives.written(path, change(honest_pt2()))


def pt2_graph(change: Callable[[Any], Any]) -> Make:
    return pt2(lambda entries: archives.with_graph(entries, change))


def pt2_weight(**change: Any) -> Make:
    return pt2(
        lambda entries: archives.with_table(
            entries, "weights", lambda table: table["c.weight"].update(change)
        )
    )


def nodes_of(document: Any) -> Any:
    return document["graph_module"]["graph"]["nodes"]


NODE = {"op": "aten.relu", "args": {"self": {"ref": "x"}}, "shape": [None, 4], "dtype": "float32"}


def program(*nodes: dict[str, Any], **change: Any) -> dict[str, Any]:
    """The JSON of a bundle's program: one relu, or the given calls, each over one before it."""
    calls = [{**NODE, "name": f"n{i}", "source": "", **node} for i, node in enumerate(nodes)]
    inputs = [{"name": "x", "shape": [None, 4], "dtype": "float32"}]
    outputs = [calls[-1]["name"]] if calls else []
    return {"format": 1, "inputs": inputs, "nodes": calls, "outputs": outputs, **change}


def bundle(document: object) -> Make:
    raw = document if isinstance(document, str) else json.dumps(document)
    header = {"__metadata__": {"foldserve.program": raw}, "w": entry("F32", [1], 0, 4)}
    return lambda path: forge.safetensors(path, header, bytes(4))


def parts(path: Path) -> None:
    """A split of an axis of 2**39: as many tensors, without any memory of their own."""
    split = {"op": "aten.unbind.int", "args": {"self": {"ref": "x"}, "dim": 1}, "shape": None}
    inputs = [{"name": "x", "shape": [None, 1 << 39], "dtype": "float32"}]
    bundle(program({**split, "dtype": None}, inputs=inputs))(path)


def wide(path: Path) -> None:
    repeat = {"self": {"ref": "x"}, "repeats": [1, 1 << 36]}
    bundle(program({"op": "aten.repeat", "args": repeat, "shape": [None, 1 << 38]}))(path)


TRICKS = (
    # Claims
    Trick(
        "1.3 kB file whose stride-0 tensor claims 40 GB",
        "stride_bomb",
        zipped({"w": weight([10**10], [0], 1)}),
    ),
    Trick("66 kB deflated zip that expands 1,000 times", "archive_bomb", deflated),
    Trick("4 MB file whose tensors alias 21 GB", "alias_bomb", aliasing),
    Trick("compressed entries", "compressed_archive", slightly_deflated),
    Trick(
        "storage that claims more bytes than its record has",
        "tensor_out_of_range",
        zipped({"w": weight([1], [1], 10**12)}),
    ),
    Trick("view beyond its storage", "tensor_out_of_range", zipped({"w": weight([2], [9], 1)})),
    # safetensors
    Trick(
        "overlapping safetensors offsets",
        "overlapping_tensors",
        lambda p: forge.safetensors(
            p, {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)
        ),
    ),
    Trick(
        "safetensors offsets out of range",
        "tensor_out_of_range",
        lambda p: forge.safetensors(
            p, {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 10**12, 10**12 + 8)}, bytes(16)
        ),
    ),
    Trick(
        "safetensors offsets that contradict the shape",
        "tensor_out_of_range",
        lambda p: forge.safetensors(p, {"a": entry("F32", [2**40], 0, 8)}, bytes(8)),
    ),
    Trick(
        "safetensors header said to be 2**60 bytes long",
        "header_too_large",
        lambda p: p.write_bytes((1 << 60).to_bytes(8, "little") + b'{"a":' + bytes(40)),
    ),
    Trick(
        "safetensors header of millions of empty lists",
        "header_too_large",
        lambda p: forge.safetensors(p, b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"),
    ),
    Trick(
        "key that stands twice in a safetensors header",
        "duplicate_key",
        lambda p: forge.safetensors(p, b'{"a":1,"a":2}'),
    ),
    Trick(
        "JSON nested 100,000 deep",
        "nesting_too_deep",
        lambda p: forge.safetensors(p, b'{"a":' * 100_000),
    ),
    # Pickles
    Trick(
        "pickle that calls a function",
        "unsafe_pickle",
        lambda p: forge.saved(p, {"w": torch.ones(1), "x": Evil()}),
    ),
    Trick(
        "pickle with any global outside the allow-list",
        "unsafe_pickle",
        with_entry(global_("builtins", "getattr")),
    ),
    Trick("whole pickled module", "whole_module_pickle", whole_module),
    Trick("pickle of millions of instructions", "pickle_bomb", endless),
    Trick("pickle whose small calls make much", "pickle_bomb", many_calls),
    Trick("pickle that copies one list 50,000 times", "pickle_bomb", copied_again_and_again),
    Trick("pickle whose key takes 2**60 steps to hash", "pickle_bomb", shared_tuple_key),
    Trick("pickle whose keys all have one hash", "pickle_bomb", colliding_keys),
    Trick("pickle nested 200,000 deep", "nesting_too_deep", with_entry(b"N" + b"\x85" * 200_000)),
    Trick("TorchScript archive", "torch_script_archive", torchscript),
    # Two files in one
    Trick("zip archive behind an image", "polyglot_file", png_and_zip),
    Trick("zip archive inside a safetensors file", "polyglot_file", zip_in_safetensors),
    Trick("bytes after the end of a zip archive", "polyglot_file", appended(zipped(PLAIN))),
    Trick("bytes after the end of an HDF5 file", "polyglot_file", appended(hdf5(lambda f: None))),
    Trick(
        "bytes after the last tensor of a safetensors file",
        "polyglot_file",
        lambda p: forge.safetensors(p, {"a": entry("F32", [1], 0, 4)}, bytes(99)),
    ),
    Trick("zip archive whose two directories disagree", "polyglot_file", two_directories),
    Trick("entry that stands twice in a zip archive", "duplicate_key", twice_in_zip),
    # Names
    Trick(
        "zip entry with a path out of the archive", "unsafe_name", named_entry("archive/../../x")
    ),
    Trick("zip entry with a NUL in its name", "unsafe_name", nul_in_entry),
    Trick(
        "zip entry with a text-direction character",
        "unsafe_name",
        named_entry("archive/\u202egnp.x"),
    ),
    Trick("key with a NUL", "unsafe_name", state(**{"w\0x": torch.ones(1)})),
    Trick(
        "key with a text-direction character", "unsafe_name", state(**{"w\u202ex": torch.ones(1)})
    ),
    Trick("key that is a path", "unsafe_name", state(**{"../../etc/w": torch.ones(1)})),
    # Values
    Trick("weights that are NaN", "non_finite_weights", state(w=torch.tensor([1.0, torch.nan]))),
    Trick(
        "weights that are infinite", "non_finite_weights", state(w=torch.tensor([1.0, -torch.inf]))
    ),
    Trick(
        "negative running_var",
        "negative_variance",
        state(**{"bn.running_var": torch.tensor([1.0, -1.0])}),
    ),
    Trick("optimizer's state without weights", "optimizer_only", optimizer),
    Trick("language model's state dict", "language_model", language_model),
    # HDF5
    Trick(
        "HDF5 link to another file",
        "external_reference",
        hdf5(lambda f: f.__setitem__("w", h5py.ExternalLink("/etc/passwd", "/x"))),
    ),
    Trick(
        "HDF5 dataset whose bytes are another file's",
        "external_reference",
        hdf5(lambda f: f.create_dataset("w", (4,), "f4", external=[("/etc/passwd", 0, 16)])),
    ),
    Trick("HDF5 virtual dataset", "external_reference", hdf5(virtual)),
    Trick(
        "HDF5 dataset compressed 1,000 times",
        "filtered_dataset",
        hdf5(lambda f: f.create_dataset("w", data=np.zeros(10**7, "f4"), compression="gzip")),
    ),
    Trick("HDF5 filter that would load a plug-in", "filtered_dataset", hdf5(plugin)),
    Trick(
        "HDF5 chunk of 2 GB",
        "filtered_dataset",
        hdf5(lambda f: f.create_dataset("w", (1 << 30,), "f4", chunks=(1 << 29,))),
    ),
    Trick(
        "HDF5 dataset of 40 GB that was never written",
        "tensor_out_of_range",
        hdf5(lambda f: f.create_dataset("w", (10**10,), "f4")),
    ),
    Trick("HDF5 file of ten thousand names", "limit_exceeded", hdf5(many_links)),
    Trick("HDF5 dataset under a hundred names", "alias_bomb", hdf5(many_names)),
    Trick(
        "HDF5 group that contains itself",
        "nesting_too_deep",
        hdf5(lambda f: f.create_group("a").__setitem__("b", f["/"])),
    ),
    # Exported programs and bundles
    Trick(
        "pt2 with a compiled library",
        "unexpected_entry",
        pt2(lambda e: {**e, "data/aotinductor/model/x.so": b"\x7fELF"}),
    ),
    Trick(
        "pt2 with a pickled custom object",
        "unexpected_entry",
        pt2(lambda e: {**e, "data/constants/custom_obj_0": b"\x80\x02}."}),
    ),
    Trick("pt2 whose tensor is a pickle", "pickled_tensor", pt2_weight(use_pickle=True)),
    Trick(
        "pt2 that calls torch.os.system",
        "unsupported_operator",
        pt2_graph(lambda d: nodes_of(d)[0].update(target="torch.os.system")),
    ),
    Trick(
        "pt2 whose sizes are code",
        "invalid_program",
        pt2_graph(lambda d: d.update(range_constraints={"__import__('os')": {}})),
    ),
    Trick(
        "pt2 whose tensor reaches beyond its record",
        "tensor_out_of_range",
        pt2(
            lambda e: archives.with_table(
                e,
                "weights",
                lambda t: t["c.weight"]["tensor_meta"].update(storage_offset={"as_int": 9999}),
            )
        ),
    ),
    Trick(
        "bundle that calls an operator outside the allow-list",
        "unsupported_operator",
        bundle(program({"op": "os.system"})),
    ),
    Trick("bundle whose graph is no graph", "invalid_program", bundle(program({}, nodes={}))),
    Trick(
        "bundle whose graph is nested 100,000 deep",
        "nesting_too_deep",
        bundle('{"format":' * 100_000),
    ),
    Trick(
        "bundle with a key that stands twice", "duplicate_key", bundle('{"format":1,"format":1}')
    ),
    Trick("bundle that splits an axis into 2**39 tensors", "invalid_program", parts),
    Trick("bundle whose value takes terabytes", "limit_exceeded", wide),
)

CONFIG_TRICKS = (
    ("model name with a path, a NUL or a text-direction character", "name_invalid"),
    ("label with a NUL or a text-direction character", "unsafe_label"),
)
"""Tricks outside the file, each with its code; `test_tricks` tries them."""

__all__ = ["CONFIG_TRICKS", "TRICKS", "Trick", "tuple_"]
