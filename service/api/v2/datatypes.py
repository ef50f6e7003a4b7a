"""The protocol's element types, and how tensors of one type become those that a model takes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from service.errors import BadInput

# In binary, elements are little-endian. BF16, which NumPy lacks, is read as its bits.
NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
_OF_TORCH: Final[dict[torch.dtype, str]] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
    torch.bfloat16: "BF16",
}
_OF_NUMPY: Final = {dtype: name for name, dtype in NUMPY.items() if name != "BF16"}
FLOATS: Final = frozenset({"FP16", "FP32", "FP64", "BF16"})


def of_torch(dtype: torch.dtype) -> str:
    """The protocol's name of a dtype that programs use, `FP32` and so on."""
    return _OF_TORCH[dtype]


def of_array(array: NDArray[Any]) -> str:
    """The protocol's name of an array's element type."""
    return _OF_NUMPY[array.dtype]


def known(datatype: object) -> str:
    """`datatype` if tensors of it can be taken. Raises BadInput."""
    if isinstance(datatype, str) and datatype in NUMPY:
        return datatype
    raise BadInput(
        f"The datatype {str(datatype)[:20]!r} is not taken.",
        remedy=f"Use one of {', '.join(NUMPY)}.",
    )


def from_bytes(data: memoryview | bytes, datatype: str) -> NDArray[Any]:
    """The elements in `data`, flat and as a view of it; BF16 as its bits."""
    return np.frombuffer(data, dtype=NUMPY[datatype])


def convert(flat: NDArray[Any], datatype: str, wanted: str, name: str) -> NDArray[Any]:
    """`flat`, read as `datatype`, in the type `wanted`; not copied when it is that and aligned.

    A floating-point input takes every floating-point type: FP16 and BF16 are widened, FP64 is
    rounded to FP32. Every other input takes its own type alone. Raises BadInput.
    """
    if datatype == wanted:
        return flat if flat.flags.aligned else flat.copy()
    if datatype not in FLOATS or wanted != "FP32":
        also = f" (or {', '.join(sorted(FLOATS - {wanted}))})" if wanted in FLOATS else ""
        raise BadInput(
            f"The input {name!r} has the datatype {datatype}; the model takes {wanted}{also}.",
            expected=wanted,
            got=datatype,
        )
    if datatype == "BF16":
        return (flat.astype(np.uint32) << 16).view(np.float32)
    try:
        with np.errstate(over="raise"):
            return flat.astype(np.float32)
    except FloatingPointError:
        raise BadInput(f"The input {name!r} holds a number beyond the range of FP32.") from None
