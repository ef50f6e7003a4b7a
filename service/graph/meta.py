"""Running single operators on meta tensors: shapes and dtypes without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from service.graph.operators import ATEN, DTYPES, FACTORIES, OPERATORS
from service.graph.program import Argument, DType, Ref

_MAX_SIZE = 1 << 62
_MAX_PARTS = 4096


def evaluate(op: str, args: Mapping[str, Argument], values: Mapping[str, Any]) -> Any:
    """What `op` gives when each Ref stands for its entry in `values` (meta tensors and sizes).

    Raises whatever the operator raises for arguments that do not fit it, and ValueError for a split
    into more parts than any network has: each is a tensor, even without memory of its own.
    """

    def resolve(argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return values[argument.name]
        if isinstance(argument, DType):
            return DTYPES[argument.name]
        if isinstance(argument, tuple):
            return [resolve(item) for item in argument]
        return argument

    if op not in ATEN:
        return _arithmetic(op, *(resolve(value) for value in args.values()))
    keyword = {argument.name for argument in ATEN[op]._schema.arguments if argument.kwarg_only}
    positional = [resolve(value) for key, value in args.items() if key not in keyword]
    named = {key: resolve(value) for key, value in args.items() if key in keyword}
    if op in _PARTS and _PARTS[op](*positional, **named) > _MAX_PARTS:
        raise ValueError(f"{op} gives more than {_MAX_PARTS} parts")
    if op in FACTORIES:
        named["device"] = "meta"
    return OPERATORS[op](*positional, **named)


def _split_parts(tensor: Any, size: int, dim: int = 0) -> int:
    return int(tensor.size(dim)) // max(size, 1)


def _chunks(tensor: Any, chunks: int, dim: int = 0) -> int:
    return min(chunks, int(tensor.size(dim)))


def _unbound(tensor: Any, dim: int = 0) -> int:
    return int(tensor.size(dim))


def _sizes(tensor: Any, sizes: list[int], dim: int = 0) -> int:
    return len(sizes)


_PARTS: dict[str, Callable[..., int]] = {
    "aten.split.Tensor": _split_parts,
    "aten.chunk": _chunks,
    "aten.unbind.int": _unbound,
    "aten.split_with_sizes": _sizes,
}


def _arithmetic(op: str, a: Any, b: Any) -> Any:
    """Sizes are small integers; text or lists times a number, or towers of powers, are not."""
    if op == "getitem":
        if not isinstance(a, (list, tuple)) or type(b) is not int:
            raise TypeError("getitem takes several outputs and an index")
        return a[b]
    if type(a) is not int or type(b) is not int:
        raise TypeError(f"{op} takes two integers")
    result = OPERATORS[op](a, b)
    if abs(result) >= _MAX_SIZE:
        raise OverflowError(f"{op} gives a number beyond any size")
    return result
