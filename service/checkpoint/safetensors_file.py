"""safetensors files: a strict look at the header, then the library's own loader.

The format (huggingface/safetensors, "Format"): 8 bytes with the header's length N as a
little-endian integer, N bytes of JSON, then the tensors' bytes. The header maps each name to
`{"dtype", "shape", "data_offsets": [begin, end]}`; the ranges must cover the rest of the file
without hole or overlap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from service.checkpoint.limits import ReadLimits, exceeded
from service.errors import (
    DuplicateKey,
    NestingTooDeep,
    NotACheckpoint,
    OverlappingTensors,
    PolyglotFile,
    TensorOutOfRange,
    TruncatedFile,
    UnsupportedContainer,
    out_of_memory,
)

BUNDLE_KEY = "foldserve.program"
"""Metadata key whose presence makes a safetensors file a bundle: a program with its weights."""

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
_MAX_DIMENSIONS = 64


def read_safetensors(path: Path, limits: ReadLimits) -> tuple[dict[str, Tensor], bool]:
    """The tensors of the file at `path`, and whether it is a bundle.

    Raises TruncatedFile, HeaderTooLarge, LimitExceeded, NestingTooDeep, UnsupportedContainer for an
    element type that has no reader, DuplicateKey, OverlappingTensors, TensorOutOfRange,
    PolyglotFile for bytes that belong to no tensor, or NotACheckpoint for a header that breaks the
    format in another way.
    """
    metadata = check_header(path, limits)
    try:
        return load_file(path, device="cpu"), BUNDLE_KEY in metadata
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise NotACheckpoint(f"The safetensors file is malformed: {str(error)[:200]}.") from None


def check_header(path: Path, limits: ReadLimits) -> dict[str, str]:
    """Check the header against the format and the file, and return its metadata."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > limits.header_bytes:
            found = f"The safetensors header claims {header_bytes} bytes"
            raise exceeded(limits, "header_bytes", found)
        if header_bytes > length - 8:
            raise TruncatedFile(
                f"The safetensors header claims {header_bytes} bytes of a file of {length}."
            )
        data = file.read(header_bytes)
    values = sum(map(data.count, (b"{", b"[", b",")))
    if values > limits.graph_values:
        raise exceeded(limits, "graph_values", f"The safetensors header has {values} values")
    header = _parse(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise NotACheckpoint("The safetensors metadata does not map strings to strings.")
    if len(header) > limits.tensors:
        raise exceeded(limits, "tensors", f"The file has {len(header)} tensors")
    _check_ranges(header, length - 8 - header_bytes)
    return metadata


def _parse(data: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise DuplicateKey("A key stands twice in the safetensors header.")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        header = json.loads(
            data.decode(), object_pairs_hook=no_duplicates, parse_constant=no_constant
        )
    except RecursionError:
        raise NestingTooDeep("The safetensors header is nested too deeply.") from None
    except ValueError as error:
        raise NotACheckpoint(f"The safetensors header is not valid: {str(error)[:120]}.") from None
    if not isinstance(header, dict):
        raise NotACheckpoint("The safetensors header is not an object.")
    return header


def _check_ranges(header: dict[str, Any], data_bytes: int) -> None:
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest}:
                if rest or not _naturals([*shape, begin, end]) or len(shape) > _MAX_DIMENSIONS:
                    raise NotACheckpoint(f"The safetensors entry {name[:80]!r} is malformed.")
            case _:
                raise NotACheckpoint(f"The safetensors entry {name[:80]!r} is malformed.")
        if dtype not in _ITEM_BYTES:
            raise UnsupportedContainer(
                f"Tensor {name[:80]!r} has elements of type {dtype[:20]!r}, which are not read.",
                remedy="Convert the tensors to float32, float16 or bfloat16.",
            )
        size = _ITEM_BYTES[dtype]
        for dimension in shape:
            size *= dimension
        if end - begin != size:
            raise TensorOutOfRange(
                f"Tensor {name[:80]!r} of shape {shape[:8]} and type {dtype} needs {size} bytes; "
                f"its range has {end - begin}."
            )
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin < position:
            raise OverlappingTensors(f"The bytes of tensor {name[:80]!r} overlap another's.")
        if begin > position:
            # A file that was cut short has its tensors one after another all the same.
            kind = TensorOutOfRange if end > data_bytes else PolyglotFile
            raise kind(f"The bytes of tensor {name[:80]!r} leave a hole before them.")
        position = end
    if position > data_bytes:
        raise TruncatedFile(f"The tensors need {position} bytes; the file has {data_bytes}.")
    if position < data_bytes:
        raise PolyglotFile(f"{data_bytes - position} bytes follow the last tensor.")


def _naturals(values: list[Any]) -> bool:
    return all(type(v) is int and 0 <= v < 1 << 63 for v in values)
