"""Kernel algebra: pure functions on float64 tensors `[O, C / groups, *k]`, no state, no graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def identity_kernel(channels: int, rank: int) -> Tensor:
    """The depthwise kernel of the identity, `[C, 1, 1, …]` with `rank` spatial axes."""
    return torch.ones(channels, 1, *[1] * rank, dtype=torch.float64)


def average_kernel(channels: int, size: Sequence[int], divisor: float) -> Tensor:
    """The depthwise kernel of average pooling (Diverse Branch Block, §3.2, Transform V)."""
    return torch.full((channels, 1, *size), 1.0 / divisor, dtype=torch.float64)


def regrouped(kernel: Tensor, groups: int, target: int) -> Tensor:
    """The same linear map written with fewer groups; `target` divides `groups`.

    The new entries are zero: output channel i of an identity gets its one at
    `[i, i mod (C / target)]`.
    """
    if groups == target:
        return kernel
    merged = groups // target
    blocks = kernel.reshape(target, merged, kernel.shape[0] // groups, *kernel.shape[1:])
    wide = blocks.new_zeros(*blocks.shape[:3], merged, *blocks.shape[3:])
    for index in range(merged):
        wide[:, index, :, index] = blocks[:, index]
    return wide.reshape(kernel.shape[0], merged * kernel.shape[1], *kernel.shape[2:])


def dilated(kernel: Tensor, dilation: Sequence[int]) -> Tensor:
    """The dense kernel of a dilated one, zeros between its entries (UniRepLKNet, §3.1)."""
    if all(d == 1 for d in dilation):
        return kernel
    size = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True)]
    dense = kernel.new_zeros(*kernel.shape[:2], *size)
    lattice: tuple[slice, ...] = tuple(slice(None, None, d) for d in dilation)
    dense[(slice(None), slice(None), *lattice)] = kernel
    return dense


def window(kernel: Tensor, before: Sequence[int], size: Sequence[int]) -> Tensor:
    """The taps of `kernel` from `before` on, `size` of them along each axis, as a view of it."""
    for axis, (start, length) in enumerate(zip(before, size, strict=True), start=2):
        kernel = kernel.narrow(axis, start, length)
    return kernel


def embedded(kernel: Tensor, before: Sequence[int], size: Sequence[int]) -> Tensor:
    """`kernel` inside a zero kernel of `size`, starting at `before`.

    Asymmetric and small kernels become square this way (ACNet, §3.3; Diverse Branch Block, §3.2,
    Transform VI).
    """
    if tuple(kernel.shape[2:]) == tuple(size):
        return kernel
    whole = kernel.new_zeros(*kernel.shape[:2], *size)
    window(whole, before, kernel.shape[2:]).copy_(kernel)
    return whole


def after_depthwise(outer: Tensor, inner: Tensor) -> Tensor:
    """The kernel of a depthwise `outer`, `[M, 1, *k2]`, after `inner`, `[M, C / groups, *k1]`.

    One of the two is 1x1. Every output channel is a product of its own: no sum over channels.
    """
    return outer * inner


def before_depthwise(outer: Tensor, inner: Tensor, groups: int) -> Tensor:
    """The kernel of `outer`, `[O, C / groups, *k2]`, after a depthwise `inner`, `[C, 1, *k1]`.

    One of the two is 1x1.
    """
    out, per_group = outer.shape[:2]
    own = inner.reshape(groups, 1, per_group, *inner.shape[2:])
    product = outer.reshape(groups, out // groups, per_group, *outer.shape[2:]) * own
    return product.reshape(out, per_group, *product.shape[3:])


def composed(outer: Tensor, inner: Tensor, stride: Sequence[int], groups: int) -> Tensor:
    """The kernel of `outer` applied after `inner`, both dense in space and of the same `groups`.

    `outer` is `[O, M / groups, *k2]`, `inner` `[M, C / groups, *k1]` of stride `stride`; the result
    is `[O, C / groups, *((k2 - 1) * stride + k1)]`. Tap v of the outer kernel meets tap u of the
    inner one at `v * stride + u`: a transposed convolution of one kernel with the other (Diverse
    Branch Block, §3.2, Transform III, there for 1x1 followed by KxK).
    """
    rank = outer.dim() - 2
    out, per_group = outer.shape[0], outer.shape[1]
    if all(k == 1 for k in inner.shape[2:]) or all(k == 1 for k in outer.shape[2:]):
        return _composed_pointwise(outer, inner, stride, groups)
    batched = outer.reshape(groups, out // groups, per_group, *outer.shape[2:]).transpose(0, 1)
    result = _TRANSPOSED[rank](
        batched.reshape(out // groups, groups * per_group, *outer.shape[2:]),
        inner,
        stride=tuple(stride),
        groups=groups,
    )
    spatial = result.shape[2:]
    grouped = result.reshape(out // groups, groups, inner.shape[1], *spatial).transpose(0, 1)
    return grouped.reshape(out, inner.shape[1], *spatial)


def _composed_pointwise(outer: Tensor, inner: Tensor, stride: Sequence[int], groups: int) -> Tensor:
    """`composed` where one of the two is 1x1: a matrix product a group."""
    outer_taps, inner_taps = outer.shape[2:], inner.shape[2:]
    a = outer.reshape(groups, outer.shape[0] // groups, outer.shape[1], -1)
    b = inner.reshape(groups, inner.shape[0] // groups, inner.shape[1], -1)
    product = torch.einsum("gomv,gmcu->gocvu", a, b).reshape(
        outer.shape[0], inner.shape[1], *(outer_taps if inner_taps.numel() == 1 else inner_taps)
    )
    return dilated(product, stride) if inner_taps.numel() == 1 else product
