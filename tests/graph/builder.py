"""Writing programs by hand, without torch.export: shapes come from running on zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from service.graph.operators import ATEN, DTYPES, OPERATORS, PLACEMENT
from service.graph.program import Argument, DType, Node, Program, Ref, TensorSpec

_PROBES = (3, 5)
"""Two batch sizes: a size that differs between them follows the batch."""


class Builder:
    """Collects inputs, weights and nodes; every value is known by its `Ref`.

    Weights are float32, as in every program that is read from a checkpoint.
    """

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: list[TensorSpec] = []
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[Any, Any]] = {}
        self._shapes: dict[str, tuple[int | None, ...]] = {}

    def input(self, *sizes: int, dtype: str = "float32") -> Ref:
        """An input of `sizes` behind a batch axis."""
        spec = TensorSpec(f"input_{len(self.inputs)}", (None, *sizes), dtype)
        self.inputs.append(spec)
        first, second = (torch.zeros(spec.sized(n), dtype=DTYPES[dtype]) for n in _PROBES)
        self._seen[spec.name] = (first, second)
        self._shapes[spec.name] = spec.shape
        return Ref(spec.name)

    def weight(self, tensor: Tensor, name: str | None = None) -> Ref:
        """A weight holding `tensor` as float32 (integers as they are)."""
        name = name or f"weight_{len(self.weights)}"
        self.weights[name] = tensor.float() if tensor.is_floating_point() else tensor
        self._seen[name] = (self.weights[name], self.weights[name])
        self._shapes[name] = tuple(tensor.shape)
        return Ref(name)

    def normal(self, *sizes: int, scale: float = 1.0) -> Ref:
        """A weight of normally distributed numbers."""
        return self.weight(torch.randn(sizes, generator=self.generator) * scale)

    def uniform(self, *sizes: int, low: float = 0.5, high: float = 1.5) -> Ref:
        """A weight of uniformly distributed numbers."""
        return self.weight(low + (high - low) * torch.rand(sizes, generator=self.generator))

    def shape(self, value: Ref) -> tuple[int | None, ...]:
        return self._shapes[value.name]

    def call(self, op: str, /, *, source: str = "", **given: Argument) -> Ref:
        """A node that calls `aten.{op}`; parameters that are left out take their defaults."""
        op = op if op in OPERATORS else f"aten.{op}"
        args: dict[str, Argument] = {}
        for parameter in ATEN[op]._schema.arguments:
            if parameter.name in given:
                args[parameter.name] = given.pop(parameter.name)
            elif parameter.name not in PLACEMENT:
                default = parameter.default_value
                args[parameter.name] = tuple(default) if isinstance(default, list) else default
        assert not given, f"{op} has no {sorted(given)}"
        results = [self._run(op, args, index) for index in (0, 1)]
        tensor = isinstance(results[0], Tensor)
        shape = None
        if tensor:
            pairs = zip(results[0].shape, results[1].shape, strict=True)
            shape = tuple(a if a == b else None for a, b in pairs)
        kind = op.removeprefix("aten.").partition(".")[0]
        name = f"{kind}_{len(self.nodes)}"
        dtype = str(results[0].dtype).removeprefix("torch.") if tensor else None
        self.nodes.append(Node(name, op, args, shape, dtype, source))
        self._seen[name] = (results[0], results[1])
        if shape is not None:
            self._shapes[name] = shape
        return Ref(name)

    def _run(self, op: str, args: Mapping[str, Argument], index: int) -> Any:
        def resolve(argument: Argument) -> Any:
            if isinstance(argument, Ref):
                return self._seen[argument.name][index]
            if isinstance(argument, DType):
                return DTYPES[argument.name]
            if isinstance(argument, tuple):
                return [resolve(item) for item in argument]
            return argument

        keyword = {a.name for a in ATEN[op]._schema.arguments if a.kwarg_only}
        function: Callable[..., Any] = OPERATORS[op]
        return function(
            *(resolve(value) for key, value in args.items() if key not in keyword),
            **{key: resolve(value) for key, value in args.items() if key in keyword},
        )

    # Frequent operators ------------------------------------------------------------------------

    def conv(
        self,
        x: Ref,
        out: int,
        kernel: tuple[int, ...],
        *,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | str | None = None,
        dilation: tuple[int, ...] | None = None,
        groups: int = 1,
        bias: bool = True,
        source: str = "",
    ) -> Ref:
        """A convolution with seeded weights that keep the scale of `x`."""
        rank = len(kernel)
        channels = self.shape(x)[1]
        assert channels is not None
        fan_in = channels // groups * int(torch.Size(kernel).numel())
        weight = self.normal(out, channels // groups, *kernel, scale=(1.5 / fan_in) ** 0.5)
        one = (1,) * rank
        return self.call(
            f"conv{rank}d.padding" if isinstance(padding, str) else f"conv{rank}d",
            source=source,
            input=x,
            weight=weight,
            bias=self.normal(out, scale=0.5) if bias else None,
            stride=stride or one,
            padding=(0,) * rank if padding is None else padding,
            dilation=dilation or one,
            groups=groups,
        )

    def norm(self, x: Ref, *, eps: float = 1e-5, affine: bool = True, source: str = "") -> Ref:
        """A batch norm in eval mode with seeded statistics."""
        channels = self.shape(x)[1]
        assert channels is not None
        return self.call(
            "batch_norm",
            source=source,
            input=x,
            weight=self.uniform(channels) if affine else None,
            bias=self.normal(channels, scale=0.5) if affine else None,
            running_mean=self.normal(channels, scale=0.5),
            running_var=self.uniform(channels, low=0.25, high=2.0),
            training=False,
            momentum=0.1,
            eps=eps,
            cudnn_enabled=False,
        )

    def relu(self, x: Ref, *, source: str = "") -> Ref:
        return self.call("relu", self=x, source=source)

    def add(self, a: Ref, b: Ref, *, alpha: float = 1, source: str = "") -> Ref:
        return self.call("add.Tensor", self=a, other=b, alpha=alpha, source=source)

    def cat(self, *values: Ref, dim: int = 1) -> Ref:
        return self.call("cat", tensors=values, dim=dim)

    def program(self, *outputs: Ref) -> Program:
        """Everything so far, with `outputs`."""
        return Program(
            tuple(self.inputs), tuple(self.nodes), tuple(o.name for o in outputs), self.weights
        )
