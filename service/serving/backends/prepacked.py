"""Convolutions whose kernels oneDNN has laid out once, instead of at every call.

Eager PyTorch keeps kernels in its own order, so oneDNN reorders each at every call. The operators
that inductor uses take kernels in oneDNN's order and apply a ReLU that follows while the result is
still in the cache; both are used here without compiling anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from service.graph import Node, Program, ProgramModule, Ref
from service.serving.backends.epilogues import relu_after, same

PACKED_ROWS = 8
"""Batch size that oneDNN is told to lay the kernels out for; any other runs with them too."""


class PrepackedModule(ProgramModule):
    """`program` with every 2-d convolution of constant kernels in oneDNN's own layout.

    Raises RuntimeError where this build of PyTorch, or a kernel, does not allow it.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        specs = program.specs()
        relus = relu_after(program)
        absorbed: set[str] = set()
        for index, node in enumerate(program.nodes):
            step = self._steps[index]
            if node.name in absorbed:
                self._steps[index] = replace(step, function=same)
            elif _is_constant_convolution(node, program.weights):
                relu = node.name in relus
                if relu:
                    absorbed.add(relus[node.name])
                source = node.args["input"]
                assert isinstance(source, Ref)
                size = specs[source.name].sized(PACKED_ROWS)
                function = _packed_convolution(node, program.weights, size, relu)
                self._steps[index] = replace(step, function=function, args=step.args[:1], kwargs={})
        self._drop_packed(program)

    def _drop_packed(self, program: Program) -> None:
        """Kernels that only packed convolutions read are held once, not twice."""
        readers = program.readers()
        nodes = {node.name: node for node in program.nodes}
        for _, buffer in self._weight_slots:
            tensor = getattr(self, buffer)
            name = next(n for n, t in program.weights.items() if t is tensor)
            mine = [nodes.get(reader) for reader in readers.get(name, [])]
            if all(n is not None and _is_constant_convolution(n, program.weights) for n in mine):
                setattr(self, buffer, tensor.new_empty(0))


def _is_constant_convolution(node: Node, weights: Mapping[str, Tensor]) -> bool:
    if node.op != "aten.conv2d":
        return False
    kernel, bias = node.args["weight"], node.args["bias"]
    return (
        isinstance(kernel, Ref)
        and kernel.name in weights
        and (bias is None or (isinstance(bias, Ref) and bias.name in weights))
        and isinstance(node.args["input"], Ref)
        and node.args["input"].name not in weights
    )


def _packed_convolution(
    node: Node, weights: Mapping[str, Tensor], size: Sequence[int], relu: bool
) -> Callable[..., Any]:
    kernel, bias = node.args["weight"], node.args["bias"]
    assert isinstance(kernel, Ref)
    stride, padding, dilation = (list(node.args[key]) for key in ("stride", "padding", "dilation"))  # type: ignore[arg-type]
    groups = node.args["groups"]
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weights[kernel.name], padding, stride, dilation, groups, list(size)
    )
    addend = weights[bias.name] if isinstance(bias, Ref) else None
    attribute = "relu" if relu else "none"
    pointwise = torch.ops.mkldnn._convolution_pointwise.default

    def convolve(x: Tensor) -> Any:
        return pointwise(x, packed, addend, padding, stride, dilation, groups, attribute, [], "")

    return convolve
