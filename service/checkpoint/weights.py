"""Checks on the values of a state dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from service.errors import NegativeVariance, NonFiniteWeights, UnsupportedContainer

_MAX_NAMED = 10
_CHUNK_ELEMENTS = 1 << 22  # a check needs memory for this many elements, not for a whole tensor


def check_weights(state: Mapping[str, Tensor]) -> None:
    """Raises NonFiniteWeights or NegativeVariance, naming the keys at fault.

    Also raises UnsupportedContainer for tensors that are sparse or quantised.
    """
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UnsupportedContainer(
                f"Tensor {key[:80]!r} is sparse or quantised.",
                remedy="Save the checkpoint with dense floating-point weights.",
            )
    broken = [key for key, tensor in state.items() if not _all(tensor, torch.isfinite)]
    if broken:
        raise NonFiniteWeights(
            f"{len(broken)} of {len(state)} tensors hold NaN or infinity: {_named(broken)}.",
            keys=broken[:_MAX_NAMED],
        )
    negative = [
        key
        for key, tensor in state.items()
        if key.endswith("running_var") and not _all(tensor, lambda part: part >= 0)
    ]
    if negative:
        raise NegativeVariance(
            f"{len(negative)} running variances are negative: {_named(negative)}.",
            keys=negative[:_MAX_NAMED],
        )


def _all(tensor: Tensor, test: Callable[[Tensor], Tensor]) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return all(bool(test(part).all()) for part in _parts(tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most `_CHUNK_ELEMENTS` elements that make up the tensor, in no stated order.

    The longest axis is halved: flattening a view that is not contiguous would copy all of it.
    """
    if tensor.numel() > _CHUNK_ELEMENTS:
        axis = max(range(tensor.dim()), key=tensor.size)
        half = tensor.size(axis) // 2
        yield from _parts(tensor.narrow(axis, 0, half))
        yield from _parts(tensor.narrow(axis, half, tensor.size(axis) - half))
    elif tensor.numel():
        # A small float type does not implement every comparison; float32 holds all its values.
        yield tensor if tensor.dtype.itemsize > 1 else tensor.float()


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return ", ".join(key[:80] for key in keys[:_MAX_NAMED]) + more
