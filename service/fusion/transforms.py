"""The six transformations of the Diverse Branch Block (Ding et al. 2021, §3.2), one function each.

For people who have two kernels in their hands and no graph. Every function is pure and exact, keeps
the dtype it is given, and takes kernels `[O, C / groups, K, K]` with biases `[O]`. The engine does
not use them: it works on affine forms, of which these are the simplest cases.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from service.fusion import kernels

Layer = tuple[Tensor, Tensor]
"""A kernel `[O, C / groups, K, K]` and its bias `[O]`."""


def fold_batch_norm(
    kernel: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    bias: Tensor | None = None,
) -> Layer:
    """Transform I: a convolution followed by batch norm, all statistics `[O]`."""
    scale = gamma / torch.sqrt(variance + eps)
    shifted = -mean if bias is None else bias - mean
    return kernel * scale.reshape(-1, 1, 1, 1), beta + shifted * scale


def add_branches(branches: Sequence[Layer]) -> Layer:
    """Transform II: branches of equal geometry whose outputs are added."""
    return (
        torch.stack([kernel for kernel, _ in branches]).sum(dim=0),
        torch.stack([bias for _, bias in branches]).sum(dim=0),
    )


def merge_sequence(first: Layer, second: Layer, groups: int = 1) -> Layer:
    """Transform III: a 1x1 convolution, then KxK, both of `groups`.

    Exact without padding between them, or with a border filled by the first bias: zero padding
    after a biased convolution is no convolution.
    """
    inner, inner_bias = first
    outer, outer_bias = second
    kernel = kernels.composed(outer, inner, (1, 1), groups)
    per_group = outer.sum(dim=(2, 3)).reshape(groups, outer.shape[0] // groups, -1)
    carried = torch.einsum("goc,gc->go", per_group, inner_bias.reshape(groups, -1)).reshape(-1)
    return kernel, outer_bias + carried


def concatenate_depth(branches: Sequence[Layer]) -> Layer:
    """Transform IV: branches of equal geometry whose outputs are stacked along channels."""
    return (
        torch.cat([kernel for kernel, _ in branches]),
        torch.cat([bias for _, bias in branches]),
    )


def average_pooling(channels: int, size: int, groups: int = 1) -> Tensor:
    """Transform V: the kernel of `size` x `size` average pooling that counts its padding."""
    kernel = kernels.average_kernel(channels, (size, size), size * size)
    return kernels.regrouped(kernel, channels, groups)


def embed_kernel(kernel: Tensor, size: int) -> Tensor:
    """Transform VI: a smaller kernel (1x1, 1xK, Kx1, ...) in the centre of a square one."""
    before = [(size - k) // 2 for k in kernel.shape[2:]]
    if any((size - k) % 2 or k > size for k in kernel.shape[2:]):
        raise ValueError(f"a {tuple(kernel.shape[2:])} kernel has no centre place in {size}x{size}")
    return kernels.embedded(kernel, before, (size, size))
