"""Arrays in and out of HTTP bodies: the npy format and JSON, checked before anything is allocated.

The npy format is NumPy's (NEP 1): a magic string, a version, a header that is a Python literal, and
the raw elements. Only the header is parsed; pickled object arrays are refused by their type.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import orjson
from numpy.lib import format as npy
from numpy.typing import NDArray

from service.errors import BadInput
from service.serving import RowSpec

Floats = NDArray[np.float32]

Bytes: TypeAlias = "bytearray | bytes | memoryview"

NPY = "application/x-npy"
_HEADER_BYTES = 4096
_WIDTHS = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4, b"\x93NUMPY\x03\x00": 4}
_KNOWN_HEADS = 1024
_FIELD = (
    rb"(?:'descr':'(?P<type>[^']{1,16})'|'fortran_order':(?P<fortran>True|False)"
    rb"|'shape':\((?P<shape>(?:[0-9]{1,18},){0,8}[0-9]{0,18})\))"
)
_HEADER = re.compile(rb"\{(?:%b(?:,|(?=\}))){3}\}" % _FIELD)
_JSON_REMEDY = 'Send {"inputs": [...]} with numbers nested as the input shape says.'
_NAMED_REMEDY = 'Send {"inputs": {name: [...]}} with every input of the model.'
_REMEDY = "Send what numpy.save writes for one float32 array."


class Head(NamedTuple):
    """What stands before the elements of an npy body; `size` in bytes, so they begin there."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    size: int

    @property
    def promises_levels(self) -> bool:
        """Whether the elements are grey levels."""
        return self.dtype.char == "B"

    def images(self, item_shape: Sequence[int]) -> int:
        """How many images it says there are, as `levels_from_npy` reads them.

        Raises BadInput for another shape.
        """
        channels, height, width = item_shape
        _check_shape(self.shape, (height, width, channels))
        return self.shape[0] if len(self.shape) == 4 else 1


def levels_from_npy(body: Bytes, item_shape: Sequence[int]) -> NDArray[np.uint8]:
    """The images [N, H, W, C] in uint8 of an npy body, for inputs of `item_shape` (C, H, W).

    One image alone, without N, is taken as N = 1. The array stays a view of `body`. Raises
    BadInput.
    """
    channels, height, width = item_shape
    array = _elements(body, read_head(body), (height, width, channels))
    return np.ascontiguousarray(array).reshape(-1, height, width, channels)


def from_npy(body: Bytes, item_shape: Sequence[int], head: Head | None = None) -> Floats:
    """The array [N, *item_shape] of an npy body; one item alone, without N, is taken as N = 1.

    float16 and float64 are converted to float32; a float32 array stays a view of `body`. `head` is
    the body's, if it was read before. Raises BadInput.
    """
    head = head or read_head(body)
    if head.dtype.kind != "f" or head.dtype.itemsize not in (2, 4, 8):
        raise BadInput(f"The array has the type {head.dtype}; float32 is wanted.", remedy=_REMEDY)
    return _batch(_elements(body, head, item_shape), item_shape)


def _elements(body: Bytes, head: Head, item_shape: Sequence[int]) -> NDArray[Any]:
    _check_shape(head.shape, item_shape)
    claimed, present = math.prod(head.shape) * head.dtype.itemsize, len(body) - head.size
    if claimed != present:
        raise BadInput(
            f"The header claims {claimed} bytes of elements; {present} follow.", remedy=_REMEDY
        )
    flat = np.frombuffer(body, dtype=head.dtype, offset=head.size)
    return flat.reshape(head.shape, order="F" if head.fortran else "C")


def from_json(body: Bytes, item_shape: Sequence[int]) -> Floats:
    """The array [N, *item_shape] of `{"inputs": nested lists of numbers}`. Raises BadInput."""
    array = _numbers(_inputs_field(body, _JSON_REMEDY))
    _check_shape(array.shape, item_shape)
    return _batch(array, item_shape)


def _inputs_field(body: Bytes, remedy: str) -> Any:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"The body is not JSON: {error}.", remedy=remedy) from None
    if not isinstance(data, dict) or "inputs" not in data:
        raise BadInput("The JSON body has no `inputs`.", remedy=remedy)
    unknown = sorted(set(data) - {"inputs"})
    if unknown:
        raise BadInput(f"The JSON body holds an unknown field {unknown[0]!r}.", remedy=remedy)
    return data["inputs"]


def _numbers(nested: Any, kinds: str = "fiu") -> NDArray[Any]:
    """Nested lists as an array whose NumPy kind is one of `kinds`."""
    try:
        array = np.asarray(nested)
    except ValueError:
        raise BadInput(
            "`inputs` is ragged: its lists differ in length.", remedy=_JSON_REMEDY
        ) from None
    if array.dtype.kind not in kinds:
        raise BadInput(
            "`inputs` holds something that is not a number of the model's type.",
            remedy=_JSON_REMEDY,
        )
    return array


def named_from_json(body: Bytes, inputs: Sequence[RowSpec]) -> dict[str, NDArray[Any]]:
    """An array [N, *shape] for each input, of `{"inputs": {name: nested lists}}`. Raises BadInput.

    A network's only input needs no name.
    """
    given = _inputs_field(body, _NAMED_REMEDY)
    if not isinstance(given, dict):
        given = {inputs[0].name if len(inputs) == 1 else "": given}
    names = [spec.name for spec in inputs]
    if set(given) != set(names):
        raise BadInput(
            f"`inputs` names {sorted(given)[:16]}; the model takes {names[:16]}.",
            remedy=_NAMED_REMEDY,
        )
    return {spec.name: _typed(given[spec.name], spec) for spec in inputs}


def _typed(nested: Any, spec: RowSpec) -> NDArray[Any]:
    """The numbers with their batch axis in the type of `spec`, if none is changed by that."""
    array = _numbers(nested, "fiu" if spec.dtype.is_floating_point else "iub")
    _check_shape(array.shape, spec.shape)
    if spec.dtype.is_floating_point:
        return _batch(array, spec.shape)
    wanted = np.dtype(str(spec.dtype).removeprefix("torch."))
    typed = array.astype(wanted)
    if not np.array_equal(typed, array):
        raise BadInput(f"{spec.name} holds a number that {wanted} does not have.")
    return typed.reshape(-1, *spec.shape)


def to_npy(array: NDArray[Any]) -> bytes:
    """The array as an npy body, elements copied once."""
    array = np.ascontiguousarray(array)
    return b"".join((_written_head(array.shape, array.dtype), array.data))


@lru_cache(_KNOWN_HEADS)
def _written_head(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    head = io.BytesIO()
    fields = {"shape": shape, "fortran_order": False, "descr": npy.dtype_to_descr(dtype)}
    npy.write_array_header_1_0(head, fields)
    return head.getvalue()


def joined(outputs: Sequence[NDArray[Any]]) -> Floats:
    """One float32 array: a single output as it is, several flattened per row and concatenated."""
    arrays = [np.asarray(output, dtype=np.float32) for output in outputs]
    if len(arrays) == 1:
        return arrays[0]
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1)


def read_head(body: Bytes) -> Head:
    """The head of an npy body. Raises BadInput."""
    width = _WIDTHS.get(bytes(body[:8]), 0)
    length = int.from_bytes(body[8 : 8 + width], "little")
    end = 8 + width + length
    try:
        if not width or length > _HEADER_BYTES or len(body) < end:
            raise ValueError
        return Head(*_read_head(bytes(body[8 + width : end])), end)
    except (ValueError, TypeError, AttributeError):
        raise BadInput("The body is not an npy file of one array.", remedy=_REMEDY) from None


@lru_cache(_KNOWN_HEADS)
def _read_head(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and element type; remembered, because clients repeat themselves.

    The header is matched, not evaluated: NumPy's own reader tokenises a damaged one as Python.
    """
    found = _HEADER.fullmatch(header.translate(None, b" \t\r\n").replace(b'"', b"'"))
    if found is None:
        raise ValueError
    shape = tuple(int(extent) for extent in found["shape"].split(b",") if extent)
    return shape, found["fortran"] == b"True", np.dtype(found["type"].decode())


def _check_shape(shape: Sequence[int], item_shape: Sequence[int]) -> None:
    item, given = tuple(item_shape), tuple(shape)
    rows = given[1:] == item and len(given) > 0 and given[0] > 0
    if not rows and given != item:
        wanted = ", ".join(["N", *map(str, item)])
        raise BadInput(
            f"The input has shape {list(shape)[:16]}; the model takes [{wanted}] with N >= 1.",
            expected=["N", *item],
            got=list(shape)[:16],
        )


def _batch(array: NDArray[Any], item_shape: Sequence[int]) -> Floats:
    """The array in float32 with its batch axis; one that is so already is not copied."""
    if array.dtype == np.float32 and array.flags.c_contiguous:
        return array if array.ndim > len(item_shape) else array[None]
    try:
        with np.errstate(over="raise"):
            rows = np.ascontiguousarray(array, dtype=np.float32)
    except FloatingPointError:
        raise BadInput("The input holds a number beyond the range of float32.") from None
    return rows.reshape(-1, *item_shape)
