"""Affine forms: what a value is, relative to a root value further up the graph.

    out[y] = F[y] + sum_u K[u] * root0[y * s - p + d * u]

`root0` is the root extended with zeros, K a kernel with stride s, offset p, dilation d and groups,
and F a bias field. Offsets may be negative (a crop) and the far end of the padding follows from the
output size, so asymmetric padding needs nothing special.

Geometry is known at once; kernels are computed only when a form is chosen, because most forms are
only looked at for their cost. Until then a form holds no copy of any weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor

from service.fusion.field import Field
from service.fusion.sources import Rule


class Inexact(Exception):
    """The result is not an affine form of one root; the message is the reason for the report."""


class Layout(Enum):
    """Which axis of a value counts channels."""

    FIRST = "channels first"
    """`[N, C, *spatial]`: convolutions and batch norms."""
    LAST = "channels last"
    """`[N, …, C]`, pointwise: linear layers on tokens. Without spatial axes both are the same."""


@dataclass(frozen=True)
class Geometry:
    """Everything about a form but its numbers. Spatial tuples have one entry an axis."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    offset: tuple[int, ...]
    dilation: tuple[int, ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]

    @staticmethod
    def identity(channels: int, size: tuple[int, ...]) -> Geometry:
        """Of the identity on a map of `size` positions: depthwise, all kernels 1."""
        one, zero = (1,) * len(size), (0,) * len(size)
        return Geometry(channels, channels, channels, one, one, zero, one, size, size)

    @property
    def extent(self) -> tuple[int, ...]:
        """Positions of the root that the kernel spans, along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def pointwise(self) -> bool:
        """Whether output y reads the root at y alone."""
        return (
            all(k == 1 for k in self.kernel)
            and all(s == 1 for s in self.stride)
            and not any(self.offset)
            and self.in_size == self.out_size
        )

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads the input channel of its own number alone."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`[O, C / groups, *k]`, the shape of the kernel that `Form.weight` computes."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return math.prod(self.weight_shape) * math.prod(self.out_size)

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Zeros before and after the root along each axis; negative: a crop."""
        return tuple(
            (before, (out - 1) * stride + extent - before - size)
            for before, out, stride, extent, size in zip(
                self.offset, self.out_size, self.stride, self.extent, self.in_size, strict=True
            )
        )

    @property
    def padding(self) -> tuple[int, ...] | None:
        """The padding of a convolution that does this by itself; None where none does.

        A convolution pads both sides alike, and ignores what its stride does not reach.
        """
        reached = (
            before >= 0 and (size + 2 * before - extent) // stride + 1 == out
            for before, size, extent, stride, out in zip(
                self.offset, self.in_size, self.extent, self.stride, self.out_size, strict=True
            )
        )
        return self.offset if all(reached) else None

    def reads_nothing_outside(self, before: Sequence[int], after: Sequence[int]) -> bool:
        """Whether K contributes zero at output positions -before … -1 and n … n + after - 1."""
        for axis, extent in enumerate(self.extent):
            stride, offset = self.stride[axis], self.offset[axis]
            if before[axis] > 0 and extent - 1 - stride - offset >= 0:
                return False
            if after[axis] > 0 and self.out_size[axis] * stride - offset < self.in_size[axis]:
                return False
        return True


Memo = dict["Kernel", Tensor]
"""Kernels of shared values already computed for one region, so that none is computed twice."""

Kernel = Callable[[Memo], Tensor]
"""Computes a float64 kernel `[O, C / groups, *k]`, a new tensor that the caller may overwrite."""


@dataclass(frozen=True)
class Weight:
    """A constant that is read when needed: its shape, and how to get a float64 copy of it."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor] = field(repr=False)

    @staticmethod
    def of(tensor: Tensor) -> Weight:
        """From a float64 tensor, which is kept as it is and cloned at every reading."""
        return Weight(tuple(tensor.shape), tensor.clone)


@dataclass(frozen=True)
class Form:
    """An affine form. `nodes` are the graph nodes it stands for, `rules` how they were joined;
    `trivial` means that it is the root itself, `shared` that several operators read the value."""

    root: str
    layout: Layout
    geometry: Geometry
    kernel: Kernel = field(repr=False)
    bias: Field = field(repr=False)
    nodes: frozenset[str] = frozenset()
    rules: frozenset[Rule] = frozenset()
    trivial: bool = False
    shared: bool = False

    def weight(self, memo: Memo | None = None) -> Tensor:
        """The float64 kernel, `[O, C / groups, *k]`; `memo` holds what the region has computed."""
        if memo is None:
            return self.kernel({})
        if not self.shared:
            return self.kernel(memo)
        if self.kernel not in memo:
            memo[self.kernel] = self.kernel(memo)
        return memo[self.kernel].clone()

    def joined(
        self,
        geometry: Geometry,
        kernel: Kernel,
        bias: Field,
        *rules: Rule,
        others: Sequence[Form] = (),
    ) -> Form:
        """A form made from this one (and `others`), remembering their nodes and rules."""
        nodes, all_rules = self.nodes, self.rules | set(rules)
        for other in others:
            nodes, all_rules = nodes | other.nodes, all_rules | other.rules
        return Form(self.root, self.layout, geometry, kernel, bias, nodes, all_rules)

    def with_node(self, node: str, *, shared: bool) -> Form:
        """The form as that of the value that `node` computes."""
        return replace(self, nodes=self.nodes | {node}, shared=shared)
