"""What a caller gives as rows, as the tensors that a program takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import BadInput
from service.serving.backends.rows import RowSpec
from service.serving.request import Column, Rows


def checked(rows: Rows, inputs: Sequence[RowSpec]) -> tuple[Tensor, ...]:
    """One tensor [N, *shape] for each input, N >= 1 the same for all.

    Raises BadInput for a wrong number, name, shape or type.
    """
    given = in_order((rows,) if isinstance(rows, np.ndarray | Tensor) else rows, inputs)
    columns = tuple(map(_column, given, inputs))
    count = len(columns[0])
    if any(len(column) != count for column in columns):
        raise BadInput(f"The inputs differ in rows: {[len(column) for column in columns]}.")
    return columns


def in_order(
    rows: tuple[Column, ...] | Mapping[str, Column], inputs: Sequence[RowSpec]
) -> tuple[Column, ...]:
    """One array for each input. Raises BadInput when one is missing or is not known."""
    names = [spec.name for spec in inputs]
    if isinstance(rows, Mapping):
        if set(rows) != set(names):
            raise BadInput(
                f"The request names the inputs {sorted(map(str, rows))[:16]}; "
                f"the model takes {names[:16]}.",
                remedy="Send every input once, by its name.",
            )
        return tuple(rows[name] for name in names)
    if len(rows) != len(names):
        raise BadInput(
            f"The request has {len(rows)} inputs; the model takes {len(names)}: {names[:16]}.",
            remedy="Send every input, by its name or in this order.",
        )
    return rows


def _column(rows: Column, spec: RowSpec) -> Tensor:
    """`rows` as a tensor, if it has the shape [N, *spec.shape] and the type that `spec` says."""
    tensor = rows if isinstance(rows, Tensor) else _as_tensor(rows)
    if tuple(tensor.shape[1:]) != spec.shape or tensor.dim() == 0 or not len(tensor):
        raise BadInput(
            f"The input {spec.name} has shape {list(tensor.shape)}; the model takes "
            f"[{', '.join(['N', *map(str, spec.shape)])}] with N >= 1.",
            expected=["N", *spec.shape],
            got=list(tensor.shape),
        )
    if tensor.dtype != spec.dtype:
        raise BadInput(f"The input {spec.name} is {tensor.dtype}; the model takes {spec.dtype}.")
    return tensor


def _as_tensor(rows: NDArray[Any]) -> Tensor:
    # A request body is a read-only buffer, which torch accepts only with a warning: copy that one.
    array = np.ascontiguousarray(rows)
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except TypeError as error:
        raise BadInput(f"The input's element type cannot be used: {error}.") from error
