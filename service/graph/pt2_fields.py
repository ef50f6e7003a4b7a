"""Single fields of a torch.export archive's graph, each checked to be what it claims to be."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from service.errors import InvalidProgram
from service.graph.pt2_archive import fields, items, union

_ARITHMETIC = {f"_operator.{name}": f"math.{name}" for name in ("add", "sub", "mul", "floordiv")}
_TARGET = re.compile(r"torch\.ops\.aten\.(\w{1,80})\.(\w{1,80})", re.ASCII)
_SYMBOL_NAME = re.compile(r"s[0-9]{1,6}")
_SOURCE = re.compile(r"[A-Za-z0-9_.]{0,255}")
_SPECIAL_FLOATS = frozenset({"Infinity", "-Infinity", "NaN"})


def batch_symbol(constraints: Any) -> str:
    """The one symbol of the archive; its range must be plain numbers that leave room to batch."""
    ranges = fields(constraints, "The table of ranges")
    if len(ranges) != 1:
        raise InvalidProgram(
            f"The program has {len(ranges)} dynamic sizes; exactly one, the batch, is read.",
            remedy="Export with dynamic_shapes=[{0: torch.export.Dim('batch')}] for every input.",
        )
    ((symbol, limits),) = ranges.items()
    bounds = [fields(limits, "A range").get(name) for name in ("min_val", "max_val")]
    if not _SYMBOL_NAME.fullmatch(symbol) or any(
        bound is not None and type(bound) is not int for bound in bounds
    ):
        raise InvalidProgram(f"The range of {symbol[:80]!r} is not two plain numbers.")
    low, high = bounds
    if (low is not None and low > 2) or (high is not None and high < 2):
        raise InvalidProgram(f"The batch may only be {low} to {high}; it must take 2.")
    return symbol


def operator_name(target: str) -> str:
    """The stored name of a target; the empty text, which is in no table, for any other spelling."""
    found = _TARGET.fullmatch(target)
    if found is None:
        return _ARITHMETIC.get(target, "")
    return f"aten.{found[1]}" + ("" if found[2] == "default" else f".{found[2]}")


def output_names(node: Mapping[str, Any]) -> Iterator[str]:
    """Names of a node's results, lists of tensors flattened; a fixed integer has none.

    Raises InvalidProgram for a result that is neither a tensor, a list of them, nor an integer.
    """
    for item in items(node.get("outputs"), "A node"):
        tag, content = union(item, "A node's output")
        if tag == "as_tensor":
            yield text_of(fields(content, "An output").get("name"), "An output's name")
        elif tag == "as_tensors":
            for part in items(content, "A node's outputs"):
                yield text_of(fields(part, "An output").get("name"), "An output's name")
        elif tag == "as_sym_int":
            kind, name = union(content, "A node's output")
            if kind == "as_name":
                yield text_of(name, "An output's name")
        else:
            raise InvalidProgram(f"A node gives a value of the kind {tag[:40]!r}.")


def module_path(metadata: Any) -> str:
    """The innermost module path, from text such as `L__self__,,Net;L__self__stem,stem,Conv`."""
    stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
    for entry in reversed(stack.split(";") if isinstance(stack, str) else []):
        path = entry.split(",")[1].partition("@")[0] if entry.count(",") == 2 else ""
        if _SOURCE.fullmatch(path) and "hook" not in path:
            return path
    return ""


def text_of(value: Any, what: str) -> str:
    """`value` if it is text. Raises InvalidProgram with `what` as the sentence's subject."""
    if not isinstance(value, str):
        raise InvalidProgram(f"{what} is not text.")
    return value


def scalar_of(tag: str, content: Any, what: str) -> bool | int | float | str:
    """The number, truth value or text that `tag` says `content` is.

    `tag` is one of `as_int`, `as_float`, `as_bool` and `as_string`. Infinities and NaN are spelled
    as text. Raises InvalidProgram for another type, and for an integer of more than 63 bits.
    """
    if tag == "as_float" and isinstance(content, str) and content in _SPECIAL_FLOATS:
        return float(content)
    expected: dict[str, tuple[type, ...]] = {
        "as_int": (int,),
        "as_float": (float, int),
        "as_bool": (bool,),
        "as_string": (str,),
    }
    if type(content) not in expected[tag] or (type(content) is int and abs(content) >= 1 << 63):
        raise InvalidProgram(f"{what} is not the {tag[3:]} that it claims to be.")
    result: bool | int | float | str = content
    return result
