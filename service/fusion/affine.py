"""The algebra of affine forms: what an operator makes of the forms of what it reads.

Every function either returns the exact form of its result or raises `Inexact` with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.fusion import kernels
from service.fusion.field import Field
from service.fusion.form import Form, Geometry, Inexact, Layout, Memo, Weight
from service.fusion.sources import Rule


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
