"""HDF5 files, as the ACNet project's utilities write them: one plain dataset a tensor.

ACNet (DingXiaoH/ACNet, utils/misc.py) writes a flat file, name -> array, with `/` in a name spelt
`+`. Groups inside groups, which others write, are joined with dots. HDF5 can do much more: links to
other files, virtual datasets, filters loaded from plug-ins, fill values instead of bytes. None of
it is needed for a state dict, so only arrays that lie in the file as they are get through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from service.checkpoint.limits import ReadLimits, exceeded
from service.errors import (
    AliasBomb,
    DuplicateKey,
    ExternalReference,
    FilteredDataset,
    FoldserveError,
    LimitExceeded,
    NestingTooDeep,
    NotACheckpoint,
    PolyglotFile,
    TensorOutOfRange,
    UnsupportedContainer,
    out_of_memory,
)

_MAX_DEPTH = 16
_MAX_AXES = 32
_MAX_LINKS = 10_000
"""The library takes 0.3 ms and 13 kB for each dataset, however small."""
_NOT_WEIGHTS = "deps"
"""ACNet stores the widths of its layers beside the weights, as whole numbers under this name."""
_DTYPES = {
    *(np.dtype(kind) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1")),
    np.dtype(bool),
}
_REMEDY = "Write each array plainly: file.create_dataset(name, data=array), nothing else."


@dataclass(frozen=True)
class _Found:
    key: str
    dataset: Any
    bytes: int


def read_hdf5(path: Path, limits: ReadLimits) -> dict[str, Tensor]:
    """The tensors of the HDF5 file at `path`, on the CPU in the file's own precision.

    Every dataset's shape, type and place is checked against the file before any is read. Raises
    for what plain files do not have ExternalReference (links, bytes in other files, virtual
    datasets), FilteredDataset (filters, chunks) and UnsupportedContainer (other types); for sizes
    TruncatedFile, TensorOutOfRange, AliasBomb, LimitExceeded and NestingTooDeep; DuplicateKey;
    PolyglotFile for bytes after the end; NotACheckpoint for a file that HDF5 refuses.
    """
    _check_end(path)
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = list(_Walk(path, limits).datasets(file, "", 0))
            total = sum(item.bytes for item in found)
            length = path.stat().st_size
            if total > limits.tensor_expansion * length:
                raise exceeded(
                    limits,
                    "tensor_expansion",
                    f"The tensors of the {length} byte file spread over {total} bytes",
                    AliasBomb,
                )
            return _tensors(found)
    except FoldserveError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        first = str(error).strip().split("\n", 1)[0][:200]
        raise NotACheckpoint(f"The HDF5 library refuses the file: {first}") from None


def _tensors(found: list[_Found]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for item in found:
        if item.key in state:
            raise DuplicateKey(f"Two datasets have the key {item.key[:80]!r}.")
        array = np.empty(item.dataset.shape, item.dataset.dtype.newbyteorder("="))
        if array.size:
            item.dataset.read_direct(array)
        state[item.key] = torch.from_numpy(array)
    return state


class _Walk:
    """One pass over the groups; remembers which it has seen, since links can form rings."""

    def __init__(self, path: Path, limits: ReadLimits) -> None:
        self._length = path.stat().st_size
        self._limits = limits
        self._seen: set[tuple[int, int]] = set()
        self._links = 0

    def datasets(self, group: Any, prefix: str, depth: int) -> Iterator[_Found]:
        """Checked datasets below `group`. Raises as `read_hdf5`."""
        info = h5py.h5o.get_info(group.id)
        if (info.fileno, info.addr) in self._seen or depth > _MAX_DEPTH:
            raise NestingTooDeep(f"The group {prefix[:80]!r} contains itself, or lies too deep.")
        self._seen.add((info.fileno, info.addr))
        self._links += group.id.get_num_objs()
        if self._links > self._limits.tensors:
            raise exceeded(self._limits, "tensors", f"The file has {self._links} links")
        if self._links > _MAX_LINKS:
            raise LimitExceeded(
                f"The HDF5 file has {self._links} links; at most {_MAX_LINKS} are read.",
                remedy="Save it as safetensors or with torch.save.",
            )
        for name in group:
            key = prefix + name.replace("+", "/")
            if len(key) > self._limits.key_characters:
                raise exceeded(self._limits, "key_characters", f"A key has {len(key)} characters")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise _refused(key, "is a link to somewhere else", ExternalReference)
            yield from self._object(group[name], key, depth)

    def _object(self, value: Any, key: str, depth: int) -> Iterator[_Found]:
        if isinstance(value, h5py.Group):
            yield from self.datasets(value, f"{key}.", depth + 1)
        elif not isinstance(value, h5py.Dataset):
            raise _refused(key, "is neither a group nor a dataset")
        elif key != _NOT_WEIGHTS or value.dtype.kind not in "iu":
            yield self._dataset(value, key)

    def _dataset(self, dataset: Any, key: str) -> _Found:
        kind, space = dataset.id.get_type(), dataset.id.get_space()
        plan = dataset.id.get_create_plist()
        if plan.get_external_count():
            raise _refused(key, "keeps its bytes in another file", ExternalReference)
        if plan.get_layout() == h5py.h5d.VIRTUAL:
            raise _refused(key, "is virtual: its bytes are other datasets'", ExternalReference)
        if plan.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or plan.get_nfilters():
            raise _refused(key, "is chunked or compressed", FilteredDataset)
        if kind.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.ENUM):
            raise _refused(key, "does not hold numbers")
        dtype = dataset.dtype.newbyteorder("=")
        if dtype not in _DTYPES or dtype.itemsize != kind.get_size():
            raise _refused(key, f"has elements of type {str(dataset.dtype)[:40]}")
        if space.get_simple_extent_type() not in (h5py.h5s.SIMPLE, h5py.h5s.SCALAR):
            raise _refused(key, "has no shape")
        shape = space.get_simple_extent_dims()
        if len(shape) > _MAX_AXES:
            raise _refused(key, f"has {len(shape)} axes")
        size = dtype.itemsize
        for axis in shape:
            size *= int(axis)
        if plan.get_layout() == h5py.h5d.CONTIGUOUS and size:
            self._check_place(dataset, key, size)
        if size > self._length:
            raise TensorOutOfRange(f"Dataset {key[:80]!r} needs {size} bytes of {self._length}.")
        return _Found(key, dataset, size)

    def _check_place(self, dataset: Any, key: str, size: int) -> None:
        """HDF5 gives fill values for bytes that were never written; a file could claim any size."""
        start = dataset.id.get_offset()
        held = dataset.id.get_storage_size()
        if start is None or held < size or start + size > self._length:
            raise TensorOutOfRange(
                f"Dataset {key[:80]!r} needs {size} bytes; the file has "
                f"{0 if start is None else max(0, min(held, self._length - start))} of them."
            )


def _check_end(path: Path) -> None:
    """Compare the file's length with the end that its superblock gives (HDF5 specification, II.A).

    The library opens a longer file as if nothing followed. A shorter one it refuses by itself.
    """
    with open(path, "rb") as file:
        head = file.read(64)
    version = head[8:9]
    end = head[40:48] if version in (b"\0", b"\1") else head[28:36]
    if version == b"\1":
        end = head[44:52]
    length = path.stat().st_size
    if 0 < int.from_bytes(end, "little") < length:
        raise PolyglotFile("Bytes follow the end of the HDF5 file.")


def _refused(
    key: str, what: str, kind: type[UnsupportedContainer] = UnsupportedContainer
) -> UnsupportedContainer:
    return kind(f"Entry {key[:80]!r} of the HDF5 file {what}.", remedy=_REMEDY, container="hdf5")
