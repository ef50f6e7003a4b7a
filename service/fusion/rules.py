"""What each linear operator does to the affine forms of its operands.

A rule is a pure function from a `Call` and the form of its data operand to the form of its result;
operators that join branches take several forms. A rule raises `Inexact` where the result is not a
convolution of the root. Operators without a rule are roots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.fusion import affine
from service.fusion.constants import Constants
from service.fusion.form import Form, Inexact, Layout, Weight
from service.fusion.kernels import average_kernel, identity_kernel
from service.fusion.sources import Rule
from service.graph.program import Node, Ref, TensorSpec


@dataclass(frozen=True)
class Call:
    """One operator call as rules see it: constants resolved to float64, the rest by name."""

    node: Node
    constants: Constants
    specs: dict[str, TensorSpec]

    @property
    def rank(self) -> int:
        """Axes of the result, the batch included."""
        return len(self.node.shape or ())

    def data(self) -> list[str]:
        """The operands that depend on the input, in order."""
        return [name for name in self.node.refs() if name not in self.constants]

    def value(self, key: str) -> Any:
        """An argument with references to constants replaced by their values."""
        return self._value(self.node.args[key])

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Ref) and argument.name in self.constants:
            return self.constants[argument.name]
        if isinstance(argument, tuple):
            return tuple(self._value(item) for item in argument)
        return argument

    def weight(self, key: str, *, transposed: bool = False) -> Weight:
        """A constant tensor argument that is not read yet. Raises Inexact if it is no constant."""
        reference = self.node.args[key]
        if not isinstance(reference, Ref) or reference.name not in self.constants:
            raise Inexact("the kernel depends on the input")
        name = reference.name
        shape = self.constants.shape(name)
        if transposed:
            return Weight(shape[::-1], lambda: self.constants.copy(name).t())
        return Weight(shape, lambda: self.constants.copy(name))

    def numbers(self, key: str, count: int) -> tuple[int, ...]:
        """An integer list argument of `count` entries; ATen lets one stand for all."""
        value = self.value(key)
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * count if len(values) == 1 else values


UnaryRule = Callable[[Call, Form], Form]
JoinRule = Callable[[Call, list[Form]], Form]


def layout_of(call: Call) -> Layout | None:
    """The layout in which a rule for this call looks at its operands; None: any."""
    node = call.node
    if node.op in {"aten.linear", "aten.matmul", "aten.mm", "aten.addmm"}:
        return Layout.LAST
    if node.op in _CHANNELS_FIRST:
        return Layout.LAST if call.rank == 2 else Layout.FIRST
    return None


def _convolution(call: Call, form: Form) -> Form:
    weight = call.weight("weight")
    rank = len(weight.shape) - 2
    if call.rank != rank + 2:
        raise Inexact("the convolution runs without a batch axis")
    dilation = call.numbers("dilation", rank)
    return affine.convolve(
        form,
        weight,
        call.value("bias"),
        call.numbers("stride", rank),
        _convolution_padding(call, weight, dilation),
        dilation,
        call.value("groups"),
    )


def _convolution_padding(
    call: Call, weight: Weight, dilation: Sequence[int]
) -> list[tuple[int, int]]:
    rank = len(weight.shape) - 2
    padding = call.value("padding")
    if padding == "valid":
        return [(0, 0)] * rank
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        return [(n // 2, n - n // 2) for n in total]
    return [(n, n) for n in call.numbers("padding", rank)]


def _batch_norm(call: Call, form: Form) -> Form:
    mean, variance = call.value("running_mean"), call.value("running_var")
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise Inexact("the batch norm keeps no running statistics")
    scale = torch.rsqrt(variance + call.value("eps"))
    if call.value("weight") is not None:
        scale = scale * call.value("weight")
    shift = -mean * scale
    if call.value("bias") is not None:
        shift = shift + call.value("bias")
    return affine.scale_shift(form, scale, shift, Rule.CONV_BN)


def _linear(call: Call, form: Form) -> Form:
    return _dense(form, call.weight("weight"), call.value("bias"))


def _matmul(call: Call, form: Form) -> Form:
    key = "mat2" if call.node.op == "aten.mm" else "other"
    matrix = call.weight(key, transposed=True)
    if len(matrix.shape) != 2:
        raise Inexact("the product is not with one constant matrix on the right")
    return _dense(form, matrix, None)


def _addmm(call: Call, form: Form) -> Form:
    matrix, bias = call.weight("mat2", transposed=True), call.value("self")
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        raise Inexact("the product is not with one constant matrix and one bias")
    if call.value("alpha") != 1 or call.value("beta") != 1:
        raise Inexact("the product is scaled")
    return _dense(form, matrix, bias)


def _dense(form: Form, weight: Weight, bias: Tensor | None) -> Form:
    return affine.convolve(form, weight, bias, (), (), (), 1, Rule.LINEAR)


def _average_pool(call: Call, form: Form) -> Form:
    geometry = form.geometry
    rank = len(geometry.out_size)
    size = call.numbers("kernel_size", rank)
    stride = call.numbers("stride", rank) or size
    padding = call.numbers("padding", rank)
    if any(padding) and not call.value("count_include_pad"):
        raise Inexact("average pooling that leaves padding out of its count is not a convolution")
    if call.value("ceil_mode"):
        floor_size = tuple(
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(geometry.out_size, padding, size, stride, strict=True)
        )
        if floor_size != (call.node.shape or ())[2:]:
            raise Inexact("average pooling in ceil mode reaches past the padding")
    override = call.node.args.get("divisor_override")
    divisor = float(override) if isinstance(override, int) else float(math.prod(size))
    channels = geometry.out_channels
    return affine.convolve(
        form,
        Weight.of(average_kernel(channels, size, divisor)),
        None,
        stride,
        [(n, n) for n in padding],
        (1,) * rank,
        channels,
        Rule.AVERAGE,
    )


def _pad(call: Call, form: Form) -> Form:
    if call.node.args.get("mode", "constant") != "constant":
        raise Inexact(f"{call.value('mode')} padding is not zero padding")
    amounts = list(call.value("pad"))
    rank = len(form.geometry.out_size)
    if form.layout is Layout.LAST or any(amounts[2 * rank :]):
        raise Inexact("the padding adds channels or rows")
    amounts = (amounts + [0] * (2 * rank))[: 2 * rank]
    pairs = [(amounts[2 * axis], amounts[2 * axis + 1]) for axis in reversed(range(rank))]
    return affine.pad(form, pairs, float(call.value("value") or 0.0))


def _slice(call: Call, form: Form) -> Form:
    source = call.specs[call.data()[0]].shape
    dim = call.value("dim") % len(source)
    size = source[dim]
    if size is None:
        raise Inexact("the batch is sliced")
    start, stop, step = slice(call.value("start"), call.value("end"), call.value("step")).indices(
        size
    )
    channel_axis = 1 if form.layout is Layout.FIRST else len(source) - 1
    if dim == channel_axis:
        if step != 1:
            raise Inexact("channels are sliced with a step")
        return affine.slice_channels(form, start, stop)
    if form.layout is Layout.LAST or dim == 0:
        raise Inexact("rows are sliced")
    return _slice_space(form, dim - 2, start, stop, step)


def _slice_space(form: Form, axis: int, start: int, stop: int, step: int) -> Form:
    rank = len(form.geometry.out_size)
    crop = [(0, 0)] * rank
    crop[axis] = (-start, stop - form.geometry.out_size[axis])
    cropped = affine.pad(form, crop, 0.0)
    if step == 1:
        return cropped
    channels = form.geometry.out_channels
    stride = [step if index == axis else 1 for index in range(rank)]
    return affine.convolve(
        cropped,
        Weight.of(identity_kernel(channels, rank)),
        None,
        stride,
        [(0, 0)] * rank,
        (1,) * rank,
        channels,
    )


def _slice_scatter(call: Call, form: Form) -> Form:
    source = call.value("src")
    dim = call.value("dim") % call.rank
    if not isinstance(source, Tensor) or form.layout is Layout.LAST or dim < 2:
        raise Inexact("a part is overwritten by something that is not a constant border")
    size = form.geometry.out_size[dim - 2]
    start, stop, step = slice(call.value("start"), call.value("end"), call.value("step")).indices(
        size
    )
    values = source.double()
    while values.dim() > call.rank - 1:
        values = values[0]
    others = [axis for axis in range(1, values.dim()) if values.shape[axis] > 1]
    if step != 1 or values.dim() != call.rank - 1:
        raise Inexact("a part is overwritten by a pattern")
    for axis in others:
        first = values.narrow(axis, 0, 1)
        if not torch.equal(values, first.expand_as(values)):
            raise Inexact("a border is overwritten by values that vary along it")
        values = first
    return affine.overwrite(form, dim - 2, start, stop, values)


def _scaled(call: Call, form: Form) -> Form:
    """Multiplication or division by a constant."""
    factor = _other(call)
    if call.node.op.startswith("aten.div"):
        if not _is_data(call, "self") or call.node.args.get("rounding_mode") is not None:
            raise Inexact("division by a value that depends on the input is not linear")
        factor = 1.0 / factor
    vector = _per_channel(factor, form, call)
    return affine.scale_shift(form, vector, torch.zeros_like(vector), Rule.SCALE_SHIFT)


def _shifted(call: Call, form: Form) -> Form:
    """Addition or subtraction of a constant, on either side."""
    other, alpha = _other(call), float(call.value("alpha"))
    reverse = call.node.op.startswith("aten.rsub")
    subtract = reverse or call.node.op.startswith("aten.sub")
    data_first = _is_data(call, "self")
    sign_data = -1.0 if subtract and (reverse == data_first) else 1.0
    sign_other = -1.0 if subtract and (reverse != data_first) else 1.0
    if reverse == data_first:
        sign_data *= alpha
    else:
        sign_other *= alpha
    if sign_data != 1.0:
        vector = torch.full((form.geometry.out_channels,), sign_data, dtype=torch.float64)
        form = affine.scale_shift(form, vector, torch.zeros_like(vector), Rule.SCALE_SHIFT)
    return affine.add_field(form, _broadcast(sign_other * other, form, call))


def _negated(call: Call, form: Form) -> Form:
    minus = torch.full((form.geometry.out_channels,), -1.0, dtype=torch.float64)
    return affine.scale_shift(form, minus, torch.zeros_like(minus), Rule.SCALE_SHIFT)


def _same(call: Call, form: Form) -> Form:
    """Operators that return their operand unchanged in eval mode."""
    source = call.specs[call.data()[0]]
    if (source.shape, source.dtype) != (call.node.shape, call.node.dtype):
        raise Inexact("the operator changes shape or precision")
    return form


def _reshaped(call: Call, form: Form) -> Form:
    """Views keep a pointwise form on the last axis as long as that axis stays."""
    source, target = call.specs[call.data()[0]].shape, call.node.shape or ()
    if source == target:
        return form
    if form.layout is Layout.FIRST or source[-1] != target[-1] or len(target) < 2:
        raise Inexact("the channels are rearranged")
    return form


def _is_data(call: Call, key: str) -> bool:
    value = call.node.args[key]
    return isinstance(value, Ref) and value.name not in call.constants


def _other(call: Call) -> Tensor:
    value = call.value("other" if _is_data(call, "self") else "self")
    return torch.as_tensor(value, dtype=torch.float64)


def _broadcast(values: Tensor, form: Form, call: Call) -> Tensor:
    """A constant operand as `[C, *size]` (broadcastable), without its batch axis."""
    rank = call.rank
    if call.specs[call.data()[0]].shape != call.node.shape:
        raise Inexact("a constant broadcasts the value to a larger shape")
    values = values.reshape((1,) * (rank - values.dim()) + tuple(values.shape))
    if values.dim() != rank or values.shape[0] != 1:
        raise Inexact("a constant differs from row to row of the batch")
    if form.layout is Layout.FIRST:
        return values[0]
    if values.numel() not in {1, values.shape[-1]}:
        raise Inexact("a constant differs from token to token")
    return values.reshape(-1)


def _per_channel(values: Tensor, form: Form, call: Call) -> Tensor:
    trimmed = _broadcast(values, form, call)
    if trimmed.numel() not in {1, trimmed.shape[0] if trimmed.dim() else 1}:
        raise Inexact("a factor differs from position to position")
    return trimmed.reshape(-1).expand(form.geometry.out_channels).contiguous()


def _sum(call: Call, forms: list[Form]) -> Form:
    alpha = float(call.value("alpha"))
    sign = -alpha if call.node.op.startswith("aten.sub") else alpha
    return affine.add(forms[0], forms[1], sign)


def _concatenation(call: Call, forms: list[Form]) -> Form:
    dim = call.value("dim") % call.rank
    if dim != (1 if forms[0].layout is Layout.FIRST else call.rank - 1):
        raise Inexact("the concatenation is not along channels")
    return affine.concatenate(forms)


_CHANNELS_FIRST = frozenset(
    [f"aten.conv{rank}d{kind}" for rank in (1, 2, 3) for kind in ("", ".padding")]
    + [f"aten.avg_pool{rank}d" for rank in (1, 2, 3)]
    + ["aten.batch_norm"]
)

UNARY: dict[str, UnaryRule] = {
    **{f"aten.conv{rank}d{kind}": _convolution for rank in (1, 2, 3) for kind in ("", ".padding")},
    **{f"aten.avg_pool{rank}d": _average_pool for rank in (1, 2, 3)},
    "aten.batch_norm": _batch_norm,
    "aten.linear": _linear,
    "aten.matmul": _matmul,
    "aten.mm": _matmul,
    "aten.addmm": _addmm,
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
    "aten.slice.Tensor": _slice,
    "aten.slice_scatter": _slice_scatter,
    **{
        f"aten.{name}": _scaled for name in ("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar")
    },
    **{
        f"aten.{name}": _shifted
        for name in ("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar")
    },
    "aten.neg": _negated,
    **{
        f"aten.{name}": _same
        for name in (
            "clone",
            "alias",
            "detach",
            "contiguous",
            "dropout",
            "expand",
            "to.dtype",
            "lift_fresh_copy",
            "_to_copy",
        )
    },
    **{
        f"aten.{name}": _reshaped
        for name in (
            "view",
            "reshape",
            "_unsafe_view",
            "flatten.using_ints",
            "unsqueeze",
            "squeeze.dim",
            "squeeze.dims",
            "unflatten.int",
            "view_as",
        )
    },
}
"""Operators of one data operand. With several data operands none of these applies."""

JOIN: dict[str, JoinRule] = {
    "aten.add.Tensor": _sum,
    "aten.sub.Tensor": _sum,
    "aten.cat": _concatenation,
}
"""Operators that join branches."""

CONVOLUTIONS = frozenset(
    [f"aten.conv{rank}d{kind}" for rank in (1, 2, 3) for kind in ("", ".padding")]
    + ["aten.conv_transpose1d", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input"]
)
"""Operators that reports count as convolutions."""
