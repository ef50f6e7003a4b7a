"""The parts of a torch.export archive (`.pt2`), read as plain JSON and plain bytes.

The layout is torch 2.13's (torch/export/pt2_archive): `models/model.json` holds the graph,
`data/weights` and `data/constants` hold one raw record a storage beside a JSON table that maps
names to records. Whatever torch would unpickle, compile or evaluate is refused by its name or, like
the sample inputs, never opened.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from service.errors import (
    DuplicateKey,
    HeaderTooLarge,
    InvalidProgram,
    LimitExceeded,
    NestingTooDeep,
    PickledTensor,
    StrideBomb,
    TensorOutOfRange,
    UnexpectedEntry,
)

Places: TypeAlias = Mapping[str, tuple[int, int]]
"""Entry name below the archive's one folder -> (first byte in the file, length)."""

_GRAPH = "models/model.json"
_TABLES = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
_PLAIN = {"archive_format", "archive_version", "byteorder", ".data/version"}
_KNOWN = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
    r"|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d{1,7}|model_weights_config\.json)"
    r"|data/constants/(tensor_\d{1,7}|model_constants_config\.json)"
)
_MAX_PLAIN_BYTES = 64
_MAX_SIZE = 1 << 40

DTYPE_OF = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    12: torch.bool,
    13: torch.bfloat16,
}
"""Number in the archive (torch/_export/serde/schema.py, ScalarType) -> dtype."""
STRIDED = 7
"""Number of the dense layout (the same file, Layout)."""


@dataclass(frozen=True)
class Pt2Limits:
    """What an archive may hold at most; a breach raises LimitExceeded naming the field.

    Attributes:
        header_bytes: one JSON document, bytes.
        graph_values: brackets, braces and commas of one JSON document, count. Parsed, each may
            take some 150 bytes.
        tensors: tensors in the archive, count.
        tensor_expansion: sum of the tensors' elements in bytes over the file's length, ratio.
        graph_nodes: operator calls of the graph, count.
        graph_constant_bytes: tensors that the graph makes from nothing, all together, bytes.
        graph_value_bytes: one intermediate value for three samples, bytes.
    """

    header_bytes: int = 32 << 20
    graph_values: int = 1_000_000
    tensors: int = 50_000
    tensor_expansion: float = 2.0
    graph_nodes: int = 20_000
    graph_constant_bytes: int = 64 << 20
    graph_value_bytes: int = 8 << 30

    def check(
        self, name: str, found: float, what: str, kind: type[LimitExceeded] = LimitExceeded
    ) -> None:
        """Raise LimitExceeded, or its `kind`, when `found` is above the field `name`."""
        limit = getattr(self, name)
        if found > limit:
            raise kind(f"{what}: {found:g}, while {name} is {limit:g}.", limit=name, value=limit)


@dataclass(frozen=True)
class Record:
    """One tensor: where its bytes are, and how they are laid out (element counts)."""

    entry: str
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def reach(self) -> int:
        """Elements of the record that the tensor needs, from the record's start."""
        if 0 in self.size:
            return self.offset
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return self.offset + last + 1

    @property
    def bytes(self) -> int:
        """Bytes of the tensor's elements, written out."""
        return int(torch.Size(self.size).numel()) * self.dtype.itemsize


class Pt2Archive:
    """An archive whose entries and tensor tables have been checked.

    Attributes:
        graph: the JSON document of the exported program.
        weights, constants: records by name.
    """

    def __init__(self, path: Path, places: Places, limits: Pt2Limits) -> None:
        self._path, self._places, self._limits = path, places, limits
        self._check_entries()
        self.graph = self._json(_GRAPH)
        self.weights, self.constants = (self._table(folder) for folder in _TABLES)
        self._check_extents()

    def tensors(self) -> dict[str, Tensor]:
        """Every record's tensor; tensors of one record share its memory."""
        flat: dict[str, Tensor] = {}
        loaded: dict[str, Tensor] = {}
        for name, record in {**self.weights, **self.constants}.items():
            if record.entry not in flat:
                flat[record.entry] = self._bytes(record.entry)
            data = flat[record.entry]
            whole = data[: len(data) // record.dtype.itemsize * record.dtype.itemsize]
            loaded[name] = torch.as_strided(
                whole.view(record.dtype), record.size, record.stride, record.offset
            )
        return loaded

    def _check_entries(self) -> None:
        unknown = sorted(name for name in self._places if not _KNOWN.fullmatch(name))
        if unknown:
            raise UnexpectedEntry(
                f"The archive holds {unknown[0][:80]!r}, which is not part of a plain export "
                "(graph and raw tensors).",
                entry=unknown[0][:80],
            )
        missing = sorted({_GRAPH, *_PLAIN, *_TABLES.values()} - self._places.keys())
        if missing:
            raise InvalidProgram(f"The archive has no entry {missing[0]!r}.")
        for name, values in (
            ("archive_format", {"pt2"}),
            ("archive_version", {"0"}),
            ("byteorder", {sys.byteorder}),
        ):
            found = self._read(name, _MAX_PLAIN_BYTES).decode("ascii", "replace").strip()
            if found not in values:
                raise InvalidProgram(f"The archive's {name} is {found[:20]!r}, which is not read.")

    def _read(self, entry: str, most: int) -> bytes:
        start, length = self._places[entry]
        if length > most:
            raise HeaderTooLarge(
                f"The archive's {entry} has {length} bytes; header_bytes is {most}.",
                limit="header_bytes",
                value=most,
            )
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def _bytes(self, entry: str) -> Tensor:
        start, length = self._places[entry]
        data = torch.empty(length, dtype=torch.uint8)
        with open(self._path, "rb") as file:
            file.seek(start)
            if length and file.readinto(data.numpy().data) != length:
                raise InvalidProgram(f"The archive's {entry} is cut short.")
        return data

    def _json(self, entry: str) -> dict[str, Any]:
        data = self._read(entry, self._limits.header_bytes)
        count = sum(map(data.count, (b"{", b"[", b",")))
        self._limits.check("graph_values", count, f"Values in {entry}", HeaderTooLarge)
        try:
            document = json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
        except RecursionError:
            raise NestingTooDeep(f"{entry} is not valid JSON: it is nested too deeply.") from None
        except ValueError as error:
            raise InvalidProgram(f"{entry} is not valid JSON: {str(error)[:120]}.") from None
        return fields(document, entry)

    def _table(self, folder: str) -> dict[str, Record]:
        entry = _TABLES[folder]
        config = fields(self._json(entry).get("config"), f"The config of {entry}")
        self._limits.check("tensors", len(config), f"Tensors in {entry}")
        return {name: self._record(folder, name, item) for name, item in config.items()}

    def _record(self, folder: str, name: str, item: Any) -> Record:
        what = f"Tensor {name[:80]!r}"
        payload = fields(item, what)
        path = payload.get("path_name")
        entry = f"{folder}{path}"
        if payload.get("use_pickle") is not False:
            raise PickledTensor(f"{what} is stored as a pickle, which is never loaded.")
        if not isinstance(path, str) or path.endswith(".json") or entry not in self._places:
            raise InvalidProgram(f"{what} names {str(path)[:80]!r}, which is no tensor record.")
        meta = fields(payload.get("tensor_meta"), f"The layout of {what}")
        dtype, size = tensor_kind(meta, what)
        stride = tuple(natural(step, what) for step in items(meta.get("strides"), what))
        if len(stride) != len(size):
            raise InvalidProgram(f"{what} has {len(size)} sizes but {len(stride)} strides.")
        sizes = tuple(natural(n, what) for n in size)
        return Record(entry, dtype, sizes, stride, natural(meta.get("storage_offset"), what))

    def _check_extents(self) -> None:
        both = self.weights.keys() & self.constants.keys()
        if both:
            raise InvalidProgram(f"Tensor {min(both)[:80]!r} is both a weight and a constant.")
        total = 0
        for name, record in {**self.weights, **self.constants}.items():
            held = self._places[record.entry][1]
            need = record.reach * record.dtype.itemsize
            if need > held:
                raise TensorOutOfRange(
                    f"Tensor {name[:80]!r} reaches to byte {need} of a record of {held} bytes."
                )
            total += record.bytes
        ratio = total / self._path.stat().st_size
        self._limits.check(
            "tensor_expansion", ratio, "The tensors' bytes over the file's", StrideBomb
        )


def tensor_kind(meta: Mapping[str, Any], what: str) -> tuple[torch.dtype, list[Any]]:
    """dtype and the list of sizes, as the archive spells them, of a dense tensor."""
    number = meta.get("dtype")
    if type(number) is not int or number not in DTYPE_OF:
        raise InvalidProgram(f"{what} has an element type (number {str(number)[:8]}) not read.")
    if meta.get("layout") != STRIDED:
        raise InvalidProgram(f"{what} is not dense.")
    sizes = items(meta.get("sizes"), what)
    if len(sizes) > 8:
        raise InvalidProgram(f"{what} has {len(sizes)} axes; at most 8 are read.")
    return DTYPE_OF[number], sizes


def fields(value: Any, what: str) -> dict[str, Any]:
    """`value` when it is a JSON object."""
    if not isinstance(value, dict):
        raise InvalidProgram(f"{what} is not an object.")
    return value


def items(value: Any, what: str) -> list[Any]:
    """`value` when it is a JSON list."""
    if not isinstance(value, list):
        raise InvalidProgram(f"{what} lacks a list.")
    return value


def union(value: Any, what: str) -> tuple[str, Any]:
    """Tag and content of a union: an object with exactly one field."""
    if not isinstance(value, dict) or len(value) != 1:
        raise InvalidProgram(f"{what} is not exactly one kind of value.")
    ((tag, content),) = value.items()
    return tag, content


def natural(value: Any, what: str) -> int:
    """The integer in `{"as_int": n}`, 0 <= n < 2**40; a size that is text is refused."""
    tag, content = union(value, what)
    if tag != "as_int" or type(content) is not int or not 0 <= content < _MAX_SIZE:
        raise InvalidProgram(f"{what} has a size, stride or offset that is not a plain number.")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKey("A key stands twice in a JSON document of the archive.")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
