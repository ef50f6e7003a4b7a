"""What a piece of network costs: multiply-accumulates and memory traffic of one sample.

The engine fuses where this does not rise. Traffic is counted in elements and weighted: on the CPUs
and GPUs this was measured on, moving one float32 takes about as long as 16 multiply-accumulates, so
a kernel may grow a little where it saves a pass over a feature map, and only there.
"""

from __future__ import annotations

import math

from service.fusion.form import Geometry
from service.fusion.rules import CONVOLUTIONS
from service.graph.program import Node, Program, Ref, TensorSpec

MACS_PER_ELEMENT = 16
"""Weight of moving one element, in multiply-accumulates."""

_FREE = frozenset(
    """
    aten.view aten.reshape aten._unsafe_view aten.flatten.using_ints aten.unflatten.int aten.view_as
    aten.unsqueeze aten.squeeze.dim aten.squeeze.dims aten.expand aten.slice.Tensor aten.select.int
    aten.narrow aten.transpose.int aten.permute aten.t aten.movedim.int aten.alias aten.detach
    aten.contiguous aten.clone aten.lift_fresh_copy aten.dropout aten.sym_size.int
    """.split()  # noqa: SIM905
)
"""Operators that return a view; `clone` is one after functionalisation removed what needed it."""

_MATRIX = frozenset({"aten.linear", "aten.matmul", "aten.mm", "aten.addmm"})


def elements(shape: tuple[int | None, ...] | None) -> int:
    """Elements of one sample."""
    return math.prod(size for size in shape or () if size is not None)


def node_macs(node: Node, specs: dict[str, TensorSpec]) -> int:
    """Multiply-accumulates of a convolution, linear layer or constant matrix product; else 0."""
    if node.op in CONVOLUTIONS:
        weight = _operand(node, "weight", specs)
        if "transpose" in node.op:
            source = _operand(node, "input", specs)
            return elements(weight.shape[1:]) * elements(source.shape) if weight and source else 0
        return elements(weight.shape[1:]) * elements(node.shape) if weight else 0
    if node.op in _MATRIX:
        weight = _operand(node, "weight", specs)
        inner = weight.shape[-1] if weight else None
        if inner is None:
            left = next((specs[n] for n in node.refs() if n in specs), None)
            inner = left.shape[-1] if left and left.shape else 1
        return elements(node.shape) * (inner or 1)
    return 0


def _operand(node: Node, key: str, specs: dict[str, TensorSpec]) -> TensorSpec | None:
    value = node.args.get(key)
    return specs.get(value.name) if isinstance(value, Ref) else None


def node_cost(node: Node, specs: dict[str, TensorSpec]) -> float:
    """Cost of running the node as it is. Arithmetic outside products counts one an element."""
    if node.op in _FREE or node.shape is None:
        return 0.0
    read = sum(elements(specs[name].shape) for name in set(node.refs()) if _counts(name, specs))
    arithmetic = node_macs(node, specs) or elements(node.shape)
    if node.op.startswith("aten.avg_pool"):
        size = node.args["kernel_size"]
        window = math.prod(n for n in size if isinstance(n, int)) if isinstance(size, tuple) else 1
        arithmetic = window * elements(node.shape)
    return arithmetic + MACS_PER_ELEMENT * (read + elements(node.shape))


def _counts(name: str, specs: dict[str, TensorSpec]) -> bool:
    """Whether reading a value counts as traffic; biases and other vectors are too small to."""
    return name in specs and len(specs[name].shape) > 1


def form_cost(geometry: Geometry, rows: int) -> float:
    """Cost of one operator with this geometry; `rows` counts positions that are not spatial."""
    source = geometry.in_channels * math.prod(geometry.in_size) * rows
    result = geometry.out_channels * math.prod(geometry.out_size) * rows
    weights = math.prod(geometry.weight_shape)
    return geometry.macs * rows + MACS_PER_ELEMENT * (source + result + weights)


def pad_cost(geometry: Geometry) -> float:
    """Cost of padding or cropping the root by an operator of its own."""
    source = geometry.in_channels * math.prod(geometry.in_size)
    size = (n + sum(pair) for n, pair in zip(geometry.in_size, geometry.pads, strict=True))
    padded = geometry.in_channels * math.prod(size)
    return padded + MACS_PER_ELEMENT * float(source + padded)


def program_macs(program: Program) -> int:
    """Multiply-accumulates of one sample through convolutions and linear layers."""
    specs = program.specs()
    return sum(node_macs(node, specs) for node in program.nodes)


def convolution_count(program: Program) -> int:
    """How many convolutions the program runs."""
    return sum(node.op in CONVOLUTIONS for node in program.nodes)
