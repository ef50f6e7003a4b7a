"""What a caller gives as rows, as the tensors that a program takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import BadInput
from service.serving.backends.parts import BatchPart, normalised
from service.serving.backends.rows import RowSpec
from service.serving.request import Column, Rows


def checked(rows: Rows, inputs: Sequence[RowSpec], *, levels: bool = False) -> BatchPart:
    """One tensor [N, *shape] for each input, N >= 1 the same for all.

    Grey levels stay what they are if the program takes `levels`, and are normalised here if not.
    Raises BadInput for a wrong number, name, shape or type.
    """
    if isinstance(rows, BatchPart):
        return _levels(rows, inputs, levels)
    if isinstance(rows, np.ndarray) and len(inputs) == 1:  # nearly every request
        return BatchPart((_column(rows, inputs[0]),))
    given = in_order((rows,) if isinstance(rows, np.ndarray | Tensor) else rows, inputs)
    columns = tuple(map(_column, given, inputs))
    counts = [column.size(0) for column in columns]
    if len(set(counts)) > 1:
        raise BadInput(f"The inputs differ in rows: {counts}.")
    return BatchPart(columns)


def _levels(part: BatchPart, inputs: Sequence[RowSpec], taken: bool) -> BatchPart:
    if part.levels is None:
        return checked(part.columns, inputs)
    values = part.columns[0]
    shape = tuple(values.permute(0, 3, 1, 2).shape[1:]) if values.dim() == 4 else ()
    if values.dtype != torch.uint8 or [shape] != [spec.shape for spec in inputs] or not len(part):
        raise BadInput(
            f"Images of shape {list(values.shape)} were given; the model takes "
            f"{[list(spec.shape) for spec in inputs]}."
        )
    if taken:
        return part
    return checked(normalised(values, part.levels), inputs)


def too_many(count: int, most: int) -> BadInput:
    """The error for a request of more rows than may wait at all."""
    return BadInput(
        f"The request has {count} rows; at most {most} can wait.",
        remedy="Send fewer rows at a time, or raise the queue's size.",
    )


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
    shape = tuple(rows.shape)
    if shape[1:] != spec.shape or not shape or not shape[0]:
        raise BadInput(
            f"The input {spec.name} has shape {list(shape)}; the model takes "
            f"[{', '.join(['N', *map(str, spec.shape)])}] with N >= 1.",
            expected=["N", *spec.shape],
            got=list(shape),
        )
    tensor = rows if isinstance(rows, Tensor) else as_tensor(rows)
    if tensor.dtype != spec.dtype:
        raise BadInput(f"The input {spec.name} is {tensor.dtype}; the model takes {spec.dtype}.")
    return tensor


def as_tensor(rows: NDArray[Any]) -> Tensor:
    """The array as a tensor, without a copy if it is contiguous and may be written to.

    Raises BadInput for an element type that torch does not have.
    """
    # A request body is a read-only buffer, which torch accepts only with a warning: copy that one.
    array = np.ascontiguousarray(rows)
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except TypeError as error:
        raise BadInput(f"The input's element type cannot be used: {error}.") from error
