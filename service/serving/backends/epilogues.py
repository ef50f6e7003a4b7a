"""ReLUs that the convolution before them can apply while its result is still at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from service.graph import Program, ProgramModule, Ref


def relu_after(program: Program) -> dict[str, str]:
    """The name of the ReLU for each 2-d convolution whose result nothing else reads."""
    readers = program.readers()
    nodes = {node.name: node for node in program.nodes}
    found = {}
    for node in program.nodes:
        then = readers.get(node.name, [])
        follower = nodes.get(then[0]) if len(then) == 1 else None
        if node.op == "aten.conv2d" and follower is not None and follower.op == "aten.relu":
            found[node.name] = follower.name
    return found


class CudnnModule(ProgramModule):
    """`program` with every convolution and the ReLU behind it as one operator of cuDNN's.

    Kernel, bias and ReLU then cost one pass over the result instead of three. Runs on a CUDA device
    only; cuDNN refuses what it cannot do when it runs, with a RuntimeError.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        relus = relu_after(program)
        absorbed = set(relus.values())
        for index, node in enumerate(program.nodes):
            step = self._steps[index]
            if node.name in absorbed:
                self._steps[index] = replace(step, function=same)
            elif node.name in relus and isinstance(node.args["weight"], Ref):
                geometry = [
                    list(node.args[key])  # type: ignore[arg-type]
                    for key in ("stride", "padding", "dilation")
                ]
                function = _with_relu(geometry, node.args["groups"])
                # Input, kernel and bias stay what they are; the rest is in the function.
                self._steps[index] = replace(step, function=function, args=step.args[:3], kwargs={})


def same(value: Tensor) -> Tensor:
    """What is left of an operator that another one has absorbed."""
    return value


def _with_relu(geometry: list[list[Any]], groups: Any) -> Callable[..., Any]:
    convolution = torch.ops.aten.cudnn_convolution_relu.default

    def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Any:
        return convolution(x, kernel, bias, *geometry, groups)

    return convolve
