"""The operators a program may use: an allow-list from stored name to callable.

Names in files are only ever looked up here, never resolved, so a file can ask for nothing else.
Every operator is pure, functional and deterministic, and reads nothing but its arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

_ATEN = """
    conv1d conv2d conv3d conv2d.padding conv1d.padding conv3d.padding
    conv_transpose1d conv_transpose2d.input conv_transpose3d.input
    batch_norm layer_norm group_norm instance_norm native_layer_norm rms_norm
    linear matmul mm bmm addmm einsum scaled_dot_product_attention embedding
    add.Tensor sub.Tensor mul.Tensor div.Tensor add.Scalar sub.Scalar mul.Scalar div.Scalar
    rsub.Scalar rsub.Tensor neg abs reciprocal exp log sqrt rsqrt sin cos tanh sigmoid erf
    pow.Tensor_Scalar pow.Tensor_Tensor maximum minimum clamp clamp_min where.self square floor
    relu relu6 leaky_relu prelu elu selu celu gelu silu mish softplus hardtanh hardswish
    hardsigmoid softmax.int log_softmax.int _softmax _log_softmax glu log_sigmoid
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d
    _adaptive_avg_pool2d
    mean mean.dim sum sum.dim_IntList amax amin max min var.correction std.correction
    linalg_vector_norm norm.ScalarOpt_dim argmax
    pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
    cat stack slice.Tensor slice_scatter select.int narrow split.Tensor split_with_sizes chunk
    unbind.int copy index_select gather roll flip
    view reshape _unsafe_view flatten.using_ints unflatten.int squeeze.dim squeeze.dims unsqueeze
    expand permute transpose.int t movedim.int numpy_T contiguous clone alias detach dropout
    lift_fresh_copy repeat tile repeat_interleave.self_int expand_as view_as
    pixel_shuffle pixel_unshuffle channel_shuffle im2col unfold
    upsample_nearest2d upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec
    to.dtype _to_copy type_as ones_like zeros_like full_like zeros ones full arange
    arange.start arange.start_step eye empty_like new_zeros new_ones new_full
    eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar eq.Tensor lt.Tensor gt.Tensor
    logical_and logical_or logical_not masked_fill.Scalar tril triu cumsum index.Tensor
    sym_size.int
"""

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "math.add": operator.add,
    "math.sub": operator.sub,
    "math.mul": operator.mul,
    "math.floordiv": operator.floordiv,
    "getitem": operator.getitem,
}


def _aten_table() -> dict[str, torch._ops.OpOverload]:
    table: dict[str, torch._ops.OpOverload] = {}
    for name in _ATEN.split():
        packet_name, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, packet_name)
        if not overload and "default" not in packet.overloads():
            raise AssertionError(f"aten.{name} has no default overload")
        table[f"aten.{name}"] = getattr(packet, overload or "default")
    return table


ATEN: dict[str, torch._ops.OpOverload] = _aten_table()
"""Stored name -> ATen overload; the default overload's name is left out, as in `aten.relu`."""

OPERATORS: dict[str, Callable[..., Any]] = {**ATEN, **_ARITHMETIC}
"""Everything a program may call; arithmetic and `getitem` work on sizes and on multiple outputs."""

NAME_OF: dict[Callable[..., Any], str] = {function: name for name, function in OPERATORS.items()}

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""Stored name -> dtype, `float32` and so on."""

FACTORIES = frozenset(
    f"aten.{name}"
    for name in ("zeros", "ones", "full", "arange", "arange.start", "arange.start_step", "eye")
)
"""Operators that make a tensor from nothing; they must be told the device."""

PLACEMENT = frozenset({"device", "layout", "pin_memory", "memory_format", "generator", "out"})
"""Arguments that say where a tensor lives, not what it holds; programs never store them."""
