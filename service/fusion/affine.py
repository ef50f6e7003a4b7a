"""Affine forms: what a value is, relative to a root value further up the graph.

    out[y] = F[y] + sum_u K[u] * root0[y * s - p + d * u]

`root0` is the root extended with zeros, K a kernel with stride s, offset p, dilation d and groups,
and F a bias field. Offsets may be negative (a crop) and the far end of the padding follows from the
output size, so asymmetric padding needs nothing special. Every function here either returns the
exact form of its result or raises `Inexact` with the reason.

Geometry is known at once; kernels are computed only when a form is chosen, because most forms are
only looked at for their cost. Until then a form holds no copy of any weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import torch
from torch import Tensor

from service.fusion import kernels
from service.fusion.field import Field


class Inexact(Exception):
    """The result is not an affine form of one root; the message is the reason for the report."""


class Layout(Enum):
    """Which axis of a value counts channels."""

    FIRST = "channels first"
    """`[N, C, *spatial]`: convolutions and batch norms."""
    LAST = "channels last"
    """`[N, …, C]`, pointwise: linear layers on tokens. Without spatial axes both are the same."""


class Rule(Enum):
    """A fusion rule and where it comes from."""

    CONV_BN = "conv-bn"
    ADDITION = "branch addition"
    SEQUENTIAL = "sequential convolutions"
    CONCATENATION = "depth concatenation"
    AVERAGE = "average pooling"
    MULTI_SCALE = "multi-scale kernels"
    IDENTITY = "identity branch"
    SCALE_SHIFT = "per-channel scale and shift"
    PADDING = "padding and cropping"
    BORDER = "border fill"
    DILATION = "dilated into dense"
    CHANNELS = "channel slices"
    LINEAR = "linear layers"
    PARAMETERS = "parameter-only folding"

    @property
    def source(self) -> str:
        return _SOURCES[self]


_SOURCES = {
    Rule.CONV_BN: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform I",
    Rule.ADDITION: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform II",
    Rule.SEQUENTIAL: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform III",
    Rule.CONCATENATION: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform IV",
    Rule.AVERAGE: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform V",
    Rule.MULTI_SCALE: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform VI; ACNet §3.3",
    Rule.IDENTITY: "Ding et al. 2021, RepVGG, §3.3",
    Rule.SCALE_SHIFT: "Hu et al. 2022, OREPA, §3.2 linear scaling layers",
    Rule.PADDING: "the definition of zero padding",
    Rule.BORDER: "Ding et al. 2021, Diverse Branch Block, §3.2 (padding after batch norm)",
    Rule.DILATION: "Ding et al. 2023, UniRepLKNet, §3.1",
    Rule.CHANNELS: "the definition of a convolution's channels",
    Rule.LINEAR: "a linear layer is a 1x1 convolution",
    Rule.PARAMETERS: "Hu et al. 2022, OREPA, §3.3 block squeezing",
}


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
        return self.groups == self.in_channels == self.out_channels

    @property
    def weight_shape(self) -> tuple[int, ...]:
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


def identity(root: str, layout: Layout, channels: int, size: tuple[int, ...]) -> Form:
    """A value as a form of itself."""
    zero = torch.zeros(channels, dtype=torch.float64)
    return Form(
        root,
        layout,
        Geometry.identity(channels, size),
        lambda _: kernels.identity_kernel(channels, len(size)),
        Field.constant(zero, size),
        trivial=True,
    )


def scale_shift(form: Form, scale: Tensor, shift: Tensor, *rules: Rule) -> Form:
    """`scale * form + shift`, both float64 `[C]`: batch norm, layer scale, scaling vectors."""
    shape = (-1, *[1] * (1 + len(form.geometry.kernel)))
    return form.joined(
        form.geometry,
        lambda memo: form.weight(memo).mul_(scale.reshape(shape)),
        form.bias.scaled(scale, shift),
        *rules,
    )


def add_field(form: Form, values: Tensor) -> Form:
    """`form + values`, a float64 constant `[C or 1, …]` with size 1 or full along every axis."""
    geometry = form.geometry
    zero = (0,) * len(geometry.out_size)
    whole = values.reshape((1,) * (1 + len(zero) - values.dim()) + tuple(values.shape))
    whole = whole.expand(geometry.out_channels, *whole.shape[1:])
    constant = Field(whole, zero, zero, geometry.out_size).trimmed()
    return form.joined(geometry, form.kernel, form.bias.added(constant), Rule.SCALE_SHIFT)


def convolve(
    form: Form,
    weight: Weight,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    *rules: Rule,
) -> Form:
    """A zero-padded convolution of `form`; `weight` is `[O, M / groups, *k]`.

    With padding the form must vanish outside its map by itself, because the padded value does: the
    kernel must read only zeros there (the bias field takes care of itself).
    """
    inner = form.geometry
    before = [b for b, _ in padding]
    after = [a for _, a in padding]
    if not inner.reads_nothing_outside(before, after):
        raise Inexact("zero padding after a spatial kernel is not a convolution of the root")
    taps = weight.shape[2:]
    extent = [(k - 1) * d + 1 for k, d in zip(taps, dilation, strict=True)]
    out_size = tuple(
        (n + b + a - e) // s + 1
        for n, b, a, e, s in zip(inner.out_size, before, after, extent, stride, strict=True)
    )
    common = groups if form.trivial else math.gcd(groups, inner.groups)
    point_inner = all(k == 1 for k in inner.kernel)
    point_outer = all(k == 1 for k in taps)
    if point_inner:
        kernel_size = taps
        new_dilation = tuple(d * s for d, s in zip(dilation, inner.stride, strict=True))
    elif point_outer:
        kernel_size, new_dilation = inner.kernel, inner.dilation
    else:
        kernel_size = tuple(
            (e2 - 1) * s1 + e1
            for e2, s1, e1 in zip(extent, inner.stride, inner.extent, strict=True)
        )
        new_dilation = (1,) * len(taps)
    geometry = Geometry(
        in_channels=inner.in_channels,
        out_channels=weight.shape[0],
        groups=common,
        kernel=kernel_size,
        stride=tuple(a * b for a, b in zip(stride, inner.stride, strict=True)),
        offset=tuple(b * s + p for b, s, p in zip(before, inner.stride, inner.offset, strict=True)),
        dilation=new_dilation,
        in_size=inner.in_size,
        out_size=out_size,
    )

    def kernel(memo: Memo) -> Tensor:
        if form.trivial:
            return kernels.regrouped(weight.load(), groups, common)
        if point_inner or point_outer:
            if groups == inner.out_channels == weight.shape[0]:
                return kernels.after_depthwise(weight.load(), form.weight(memo))
            if inner.depthwise:
                return kernels.before_depthwise(weight.load(), form.weight(memo), groups)
        outer = kernels.regrouped(weight.load(), groups, common)
        through = kernels.regrouped(form.weight(memo), inner.groups, common)
        if point_inner or point_outer:
            return kernels.composed(outer, through, (1,) * len(taps), common)
        return kernels.composed(
            kernels.dilated(outer, dilation),
            kernels.dilated(through, inner.dilation),
            inner.stride,
            common,
        )

    if form.bias.is_zero():
        nothing = torch.zeros(weight.shape[0], dtype=torch.float64)
        field_out = Field.constant(nothing, out_size)
    else:
        field_out = form.bias.convolved(weight.load(), stride, padding, dilation, groups)
    if bias is not None:
        field_out = field_out.scaled(torch.ones_like(bias), bias)
    if not form.trivial:
        rules = (*rules, Rule.SEQUENTIAL)
    return form.joined(geometry, kernel, field_out, *rules)


def add(a: Form, b: Form, sign: float = 1.0) -> Form:
    """`a + sign * b`, two forms of one root with equal stride and output size."""
    ga, gb = a.geometry, b.geometry
    if (a.root, a.layout) != (b.root, b.layout):
        raise Inexact("the branches start from different values")
    if (ga.out_size, ga.out_channels) != (gb.out_size, gb.out_channels):
        raise Inexact("the branches differ in shape and broadcast")
    if ga.stride != gb.stride and not all(n == 1 for n in ga.out_size):
        raise Inexact(f"the branches have different strides, {ga.stride} and {gb.stride}")
    geometry, place_a, place_b = _aligned(ga, gb)
    groups = math.gcd(ga.groups, gb.groups)
    geometry = replace(geometry, groups=groups)
    rules = [Rule.ADDITION]
    if ga.extent != gb.extent:
        rules.append(Rule.MULTI_SCALE)
    if geometry.dilation != ga.dilation or geometry.dilation != gb.dilation:
        rules.append(Rule.DILATION)
    if any(g.pointwise and g.depthwise for g in (ga, gb)):
        rules.append(Rule.IDENTITY)

    def kernel(memo: Memo) -> Tensor:
        first = kernels.regrouped(a.weight(memo), ga.groups, groups)
        second = kernels.regrouped(b.weight(memo), gb.groups, groups)
        if place_b.fills and not place_a.fills:
            whole = second if sign == 1.0 else second.mul_(sign)
            place_a.add_to(whole, first)
        else:
            whole = place_a.alone(first)
            place_b.add_to(whole, second, sign)
        return whole

    return a.joined(geometry, kernel, a.bias.added(b.bias, sign), *rules, others=[b])


@dataclass(frozen=True)
class Placement:
    """Where a kernel of `taps` and `dilation` lies in one of `size` that holds it."""

    taps: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def fills(self) -> bool:
        """Whether the kernel is as large as what holds it, so that others can be added to it."""
        return self.taps == self.size

    def alone(self, kernel: Tensor) -> Tensor:
        """The larger kernel with zeros around this one; the kernel itself where it fills it."""
        return kernels.embedded(kernels.dilated(kernel, self.dilation), self.before, self.size)

    def add_to(self, whole: Tensor, kernel: Tensor, sign: float = 1.0) -> None:
        """Add `sign` times this kernel to the larger one, which is overwritten."""
        own = kernels.dilated(kernel, self.dilation)
        kernels.window(whole, self.before, own.shape[2:]).add_(own, alpha=sign)


def _aligned(ga: Geometry, gb: Geometry) -> tuple[Geometry, Placement, Placement]:
    """The geometry that holds both kernels, and how each is placed in it."""
    same = ga.offset == gb.offset and ga.kernel == gb.kernel
    lattice_a = tuple(1 if k == 1 else d for k, d in zip(ga.kernel, ga.dilation, strict=True))
    lattice_b = tuple(1 if k == 1 else d for k, d in zip(gb.kernel, gb.dilation, strict=True))
    if same and lattice_a == lattice_b:
        dense, origin = (1,) * len(ga.kernel), (0,) * len(ga.kernel)
        whole = Placement(ga.kernel, dense, origin, ga.kernel)
        return ga, whole, whole
    offset = tuple(max(a, b) for a, b in zip(ga.offset, gb.offset, strict=True))
    reach = tuple(
        max(ea - pa, eb - pb)
        for ea, pa, eb, pb in zip(ga.extent, ga.offset, gb.extent, gb.offset, strict=True)
    )
    size = tuple(p + r for p, r in zip(offset, reach, strict=True))
    geometry = replace(ga, kernel=size, offset=offset, dilation=(1,) * len(size))

    def place(own: Geometry) -> Placement:
        before = tuple(p - o for p, o in zip(offset, own.offset, strict=True))
        return Placement(own.kernel, own.dilation, before, size)

    return geometry, place(ga), place(gb)


def concatenate(forms: Sequence[Form]) -> Form:
    """Channel concatenation of forms of one root with equal stride and output size."""
    first = forms[0]
    geometry, rules = first.geometry, {Rule.CONCATENATION}
    for other in forms[1:]:
        if (other.root, other.layout) != (first.root, first.layout):
            raise Inexact("the concatenated branches start from different values")
        if other.geometry.out_size != geometry.out_size:
            raise Inexact("the concatenated branches differ in size")
        if other.geometry.stride != geometry.stride:
            raise Inexact("the concatenated branches have different strides")
        geometry, _, _ = _aligned(geometry, other.geometry)
    total = sum(form.geometry.out_channels for form in forms)
    geometry = replace(geometry, groups=1, out_channels=total)

    def kernel(memo: Memo) -> Tensor:
        parts = []
        for form in forms:
            own = form.geometry
            target = replace(geometry, groups=own.groups)
            _, place, _ = _aligned(own, target)
            parts.append(place.alone(kernels.regrouped(form.weight(memo), own.groups, 1)))
        return torch.cat(parts)

    low = [max(form.bias.low[axis] for form in forms) for axis in range(len(geometry.kernel))]
    high = [max(form.bias.high[axis] for form in forms) for axis in range(len(geometry.kernel))]
    wide = [form.bias.widened(low, high) for form in forms]
    size = [max(part.values.shape[axis + 1] for part in wide) for axis in range(len(low))]
    bias = replace(wide[0], values=torch.cat([part.expanded(size) for part in wide])).trimmed()
    return first.joined(geometry, kernel, bias, *rules, others=forms[1:])


def slice_channels(form: Form, start: int, stop: int) -> Form:
    """Output channels `start … stop - 1`, with one group unless the slice is all of them."""
    inner = form.geometry
    if (start, stop) == (0, inner.out_channels):
        return form
    geometry = replace(inner, out_channels=stop - start, groups=1)

    def kernel(memo: Memo) -> Tensor:
        return kernels.regrouped(form.weight(memo), inner.groups, 1)[start:stop]

    return form.joined(
        geometry, kernel, form.bias.map(lambda values: values[start:stop]), Rule.CHANNELS
    )


def pad(form: Form, padding: Sequence[tuple[int, int]], value: float) -> Form:
    """Constant padding with `value`, or cropping where an amount is negative."""
    inner = form.geometry
    before = [b for b, _ in padding]
    after = [a for _, a in padding]
    if not inner.reads_nothing_outside(before, after):
        raise Inexact("padding after a spatial kernel is not a convolution of the root")
    geometry = replace(
        inner,
        offset=tuple(p + b * s for p, b, s in zip(inner.offset, before, inner.stride, strict=True)),
        out_size=tuple(n + b + a for n, b, a in zip(inner.out_size, before, after, strict=True)),
    )
    return form.joined(geometry, form.kernel, form.bias.padded(before, after, value), Rule.PADDING)


def overwrite(form: Form, axis: int, start: int, stop: int, values: Tensor) -> Form:
    """Positions `start … stop - 1` along spatial `axis` set to a constant `[C, 1, …]`.

    Exact only where the kernel reads nothing but zeros, as in a padded border.
    """
    geometry = form.geometry
    size = geometry.out_size[axis]
    stride, offset = geometry.stride[axis], geometry.offset[axis]
    extent, root_size = geometry.extent[axis], geometry.in_size[axis]
    for position in range(start, stop):
        low = position * stride - offset
        if low < root_size and low + extent > 0:
            raise Inexact("a part that depends on the input is overwritten by a constant")
    low_margin = [0] * len(geometry.out_size)
    high_margin = list(low_margin)
    if start == 0:
        low_margin[axis] = stop
    elif stop == size:
        high_margin[axis] = size - start
    else:
        low_margin[axis] = size
    wide = form.bias.widened(low_margin, high_margin)
    stored = wide.values.clone()
    index: list[slice] = [slice(None)] * stored.dim()
    shift = 0 if start == 0 or stored.shape[axis + 1] == size else stored.shape[axis + 1] - size
    index[axis + 1] = slice(start + shift, stop + shift)
    stored[tuple(index)] = values
    return form.joined(geometry, form.kernel, replace(wide, values=stored).trimmed(), Rule.BORDER)
