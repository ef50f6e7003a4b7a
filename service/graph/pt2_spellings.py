"""Spellings of a call in torch.export archives that mean an operator of the allow-list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from service.errors import InvalidProgram, UnsupportedOperator
from service.graph.build import batch_norm_arguments, check_eval, full_arguments
from service.graph.operators import ATEN
from service.graph.program import Argument, Ref

Probes = tuple[dict[str, Any], ...]
"""What every value is, on meta tensors, at each of the batch sizes that shapes are computed for."""
Rewritten = tuple[str, dict[str, Argument]]


def _native_batch_norm(_: Probes, given: dict[str, Argument]) -> Rewritten:
    names = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    return "aten.batch_norm", batch_norm_arguments(named(given, *names))


def _batch_norm(_: Probes, given: dict[str, Argument]) -> Rewritten:
    args = full_arguments("aten.batch_norm", given)
    check_eval("aten.batch_norm", args)
    return "aten.batch_norm", batch_norm_arguments(args)


def _view(_: Probes, given: dict[str, Argument]) -> Rewritten:
    args = named(given, "self", "size")
    return "aten.reshape", {"self": args["self"], "shape": args["size"]}


def _convolution(probes: Probes, given: dict[str, Argument]) -> Rewritten:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    args = named(given, *names, "transposed", "output_padding")
    weight = args["weight"]
    value = probes[0].get(weight.name) if isinstance(weight, Ref) else None
    if args["transposed"] is not False or not isinstance(value, Tensor):
        raise UnsupportedOperator(
            "aten.convolution is read for plain convolutions only.", operator="aten.convolution"
        )
    op = f"aten.conv{value.dim() - 2}d"
    if op not in ATEN:
        raise UnsupportedOperator(f"aten.convolution has {value.dim()} axes.", operator=op)
    return op, {name: args[name] for name in names}


def _as_strided(probes: Probes, given: dict[str, Argument]) -> Rewritten:
    """Core ATen ends a pooling to 1x1 with it; there it changes neither values nor shape."""
    tensor = given.get("self")

    def resolved(key: str, probe: Mapping[str, Any]) -> list[Any]:
        asked = given.get(key)
        listed = asked if isinstance(asked, tuple) else ()
        return [probe.get(item.name) if isinstance(item, Ref) else item for item in listed]

    for probe in probes:
        value = probe.get(tensor.name) if isinstance(tensor, Ref) else None
        steps = resolved("stride", probe)
        if (
            not isinstance(value, Tensor)
            or resolved("size", probe) != list(value.shape)
            or given.get("storage_offset") not in (None, 0)
            or len(steps) != value.dim()
            or any(
                step != own and size > 1
                for step, own, size in zip(steps, value.stride(), value.shape, strict=True)
            )
        ):
            raise UnsupportedOperator(
                "aten.as_strided is read only where it changes nothing.",
                operator="aten.as_strided",
            )
    return "aten.alias", {"self": given["self"]}


def _max_pool(_: Probes, given: dict[str, Argument]) -> Rewritten:
    return "aten.max_pool2d", full_arguments("aten.max_pool2d", given)


SPELLINGS = {
    "aten._native_batch_norm_legit_no_training": _native_batch_norm,
    "aten.batch_norm": _batch_norm,
    "aten.view": _view,
    "aten._unsafe_view": _view,
    "aten.convolution": _convolution,
    "aten.as_strided": _as_strided,
    "aten.max_pool2d_with_indices": _max_pool,
}


def named(given: Mapping[str, Argument], *names: str) -> dict[str, Argument]:
    """A copy of a call's arguments. Raises InvalidProgram unless they are exactly `names`."""
    if set(given) != set(names):
        odd = sorted(set(given) ^ set(names))[0]
        raise InvalidProgram(f"A call lacks or does not have the argument {odd[:80]!r}.")
    return dict(given)
