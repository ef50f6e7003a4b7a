"""Arrays in and out of HTTP bodies: the npy format and JSON, checked before anything is allocated.

The npy format is NumPy's (NEP 1): a magic string, a version, a header that is a Python literal, and
the raw elements. Only the header is parsed; pickled object arrays are refused by their type.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.lib import format as npy
from numpy.typing import NDArray

from service.errors import BadInput

Floats = NDArray[np.float32]

NPY = "application/x-npy"
MAX_DIMENSIONS = 8
_HEADER_BYTES = 4096
_REMEDY = "Send what numpy.save writes for one float32 array."


def from_npy(body: bytearray | bytes, item_shape: Sequence[int]) -> Floats:
    """The array [N, *item_shape] of an npy body; one item alone, without N, is taken as N = 1.

    float16 and float64 are converted to float32; a float32 array stays a view of `body`.
    Raises BadInput.
    """
    start = io.BytesIO(bytes(memoryview(body)[: _HEADER_BYTES + 16]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers written by Python 2 parse with a warning
            version = npy.read_magic(start)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(start, max_header_size=_HEADER_BYTES)
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadInput("The body is not an npy file of version 1 or 2.", remedy=_REMEDY) from error
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise BadInput(f"The array has the type {dtype}; float32 is wanted.", remedy=_REMEDY)
    if len(shape) > MAX_DIMENSIONS or any(extent < 0 for extent in shape):
        raise BadInput("The array's shape is impossible.", remedy=_REMEDY, got=list(shape)[:16])
    _check_shape(shape, item_shape)
    offset = start.tell()
    claimed, present = math.prod(shape) * dtype.itemsize, len(body) - offset
    if claimed != present:
        raise BadInput(
            f"The header claims {claimed} bytes of elements; {present} follow.", remedy=_REMEDY
        )
    flat = np.frombuffer(body, dtype=dtype, offset=offset)
    array = flat.reshape(shape, order="F" if fortran else "C")
    return _batch(np.ascontiguousarray(array, dtype=np.float32), item_shape)


def from_json(body: bytearray | bytes, item_shape: Sequence[int]) -> Floats:
    """The array [N, *item_shape] of `{"inputs": nested lists of numbers}`. Raises BadInput."""
    remedy = 'Send {"inputs": [...]} with numbers nested as the input shape says.'
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"The body is not JSON: {error}.", remedy=remedy) from None
    if not isinstance(data, dict) or "inputs" not in data:
        raise BadInput("The JSON body has no `inputs`.", remedy=remedy)
    unknown = sorted(set(data) - {"inputs"})
    if unknown:
        raise BadInput(f"The JSON body holds an unknown field {unknown[0]!r}.", remedy=remedy)
    try:
        array = np.asarray(data["inputs"])
    except ValueError:
        raise BadInput("`inputs` is ragged: its lists differ in length.", remedy=remedy) from None
    if array.dtype.kind not in "fiu":
        raise BadInput("`inputs` holds something that is not a number.", remedy=remedy)
    _check_shape(array.shape, item_shape)
    return _batch(np.ascontiguousarray(array, dtype=np.float32), item_shape)


def to_npy(array: NDArray[Any]) -> bytes:
    """The array as an npy body, elements copied once."""
    array = np.ascontiguousarray(array)
    head = io.BytesIO()
    npy.write_array_header_1_0(head, npy.header_data_from_array_1_0(array))
    return b"".join((head.getvalue(), array.data))


def joined(outputs: Sequence[NDArray[Any]]) -> Floats:
    """One float32 array: a single output as it is, several flattened per row and concatenated."""
    arrays = [np.asarray(output, dtype=np.float32) for output in outputs]
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def _check_shape(shape: Sequence[int], item_shape: Sequence[int]) -> None:
    item = tuple(item_shape)
    rows = tuple(shape[1:]) == item and len(shape) > 0 and shape[0] > 0
    if not rows and tuple(shape) != item:
        wanted = ", ".join(["N", *map(str, item)])
        raise BadInput(
            f"The input has shape {list(shape)[:16]}; the model takes [{wanted}] with N >= 1.",
            expected=["N", *item],
            got=list(shape)[:16],
        )


def _batch(array: Floats, item_shape: Sequence[int]) -> Floats:
    return array.reshape(-1, *item_shape)
