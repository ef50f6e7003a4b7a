"""The safetensors header: every rule of the format, broken once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.errors import (
    CheckpointError,
    LimitExceeded,
    NestingTooDeep,
    NotACheckpoint,
    TensorOutOfRange,
    TruncatedFile,
    UnsupportedContainer,
)

from . import forge
from .forge import entry

GOOD = {"a": entry("F32", [2], 0, 8), "b": entry("I64", [1], 8, 16)}


def test_the_forge_makes_a_good_file(tmp_path: Path) -> None:
    found = forge.read(forge.safetensors(tmp_path / "f", GOOD, bytes(16)))
    assert {key: value.dtype for key, value in found.state.items()} == {
        "a": torch.float32,
        "b": torch.int64,
    }


@pytest.mark.parametrize(
    ("header", "data_bytes", "kind", "says"),
    [
        (GOOD, 15, TruncatedFile, "16 bytes; the file has 15"),
        (GOOD, 17, NotACheckpoint, "1 bytes follow"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, None, "overlap"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, 20, None, "hole"),
        ({"a": entry("F32", [2], 4, 12)}, 12, None, "hole"),
        ({"a": entry("F32", [3], 0, 8)}, 8, TensorOutOfRange, "needs 12 bytes"),
        ({"a": entry("F32", [2], 8, 0)}, 8, TensorOutOfRange, "range has -8"),
        ({"a": entry("F32", [-2], 0, 8)}, 8, None, "malformed"),
        ({"a": entry("F32", [2**63], 0, 8)}, 8, None, "malformed"),
        ({"a": entry("F32", [True], 0, 4)}, 4, None, "malformed"),
        ({"a": entry("F32", [1] * 65, 0, 4)}, 4, None, "malformed"),
        ({"a": {**entry("F32", [1], 0, 4), "x": 1}}, 4, None, "malformed"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, None, "malformed"),
        ({"a": [1]}, 4, None, "malformed"),
        ({"a": entry("F4", [2], 0, 1)}, 1, UnsupportedContainer, "F4"),
        ({"__metadata__": {"x": 1}, **GOOD}, 16, None, "metadata"),
        ({"__metadata__": [], **GOOD}, 16, None, "metadata"),
        (b'{"a": NaN}', 0, None, "NaN"),
        (b"{nonsense", 0, None, "not valid"),
        (b'{"a": "\xff"}', 0, None, "not valid"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, None, "twice"),
        (b'{"a": 1, "a": 2}', 0, None, "twice"),
        (b'{"a":' * 100_000, 0, NestingTooDeep, "too deeply"),
    ],
)
def test_each_broken_rule_is_said(
    tmp_path: Path, header: object, data_bytes: int, kind: type[CheckpointError] | None, says: str
) -> None:
    path = forge.safetensors(tmp_path / "f", header, bytes(data_bytes))
    with pytest.raises(kind or NotACheckpoint, match=says):
        forge.read(path)


def test_headers_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    path = forge.safetensors(tmp_path / "f", GOOD, bytes(16))
    size = int.from_bytes(path.read_bytes()[:8], "little")
    forge.read(path, header_bytes=size, tensors=2)
    with pytest.raises(LimitExceeded, match="header_bytes"):
        forge.read(path, header_bytes=size - 1)
    with pytest.raises(LimitExceeded, match="tensors is 1"):
        forge.read(path, tensors=1)
    forge.written(path, (4 << 20).to_bytes(8, "little") + b"{}")
    with pytest.raises(TruncatedFile, match="claims 4194304 bytes"):
        forge.read(path)


def test_a_header_that_is_no_object_or_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        forge.read(forge.safetensors(tmp_path / "f", b"[]"))
    with pytest.raises(CheckpointError):
        forge.read(forge.safetensors(tmp_path / "f", {}))
