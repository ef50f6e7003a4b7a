"""Running a program: an interpreter that is an ordinary module, so every backend can take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.graph.operators import ATEN, DTYPES, FACTORIES, OPERATORS
from service.graph.program import Argument, DType, Node, Program, Ref


@dataclass(frozen=True)
class _Slot:
    """Where a value lies while the program runs."""

    index: int


@dataclass(frozen=True)
class _Step:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    needs_device: bool
    result: int
    release: tuple[int, ...]


class ProgramModule(nn.Module):
    """Runs `program`; weights are buffers, intermediates are freed after their last reader.

    `forward` takes the inputs in order and returns the output, or a tuple of several. It has no
    training mode: batch norms use their stored statistics whatever `train()` was told.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self._slots: dict[str, int] = {}
        self._weight_slots: list[tuple[int, str]] = []
        for spec in program.inputs:
            self._slot(spec.name)
        for position, (name, tensor) in enumerate(program.weights.items()):
            buffer = f"weight_{position}"
            self.register_buffer(buffer, tensor)
            self._weight_slots.append((self._slot(name), buffer))
        readers = program.readers()
        last_reader = {name: nodes[-1] for name, nodes in readers.items() if "" not in nodes}
        self._steps = [self._step(node, last_reader) for node in program.nodes]
        self._outputs = [self._slots[name] for name in program.outputs]

    def _slot(self, name: str) -> int:
        return self._slots.setdefault(name, len(self._slots))

    def _step(self, node: Node, last_reader: dict[str, str]) -> _Step:
        args, kwargs = [], {}
        positional = _positional(node.op)
        for key, value in node.args.items():
            compiled = self._compile(value)
            if key in positional:
                args.append(compiled)
            else:
                kwargs[key] = compiled
        freed = [n for n in dict.fromkeys(node.refs()) if last_reader.get(n) == node.name]
        weights = self.program.weights
        return _Step(
            OPERATORS[node.op],
            tuple(args),
            kwargs,
            node.op in FACTORIES,
            self._slot(node.name),
            tuple(self._slots[name] for name in freed if name not in weights),
        )

    def _compile(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return _Slot(self._slots[argument.name])
        if isinstance(argument, DType):
            return DTYPES[argument.name]
        if isinstance(argument, tuple):
            return [self._compile(item) for item in argument]
        return argument

    def forward(self, *inputs: Tensor) -> Any:
        """Compute the outputs from `inputs` (shapes and dtypes as in `program.inputs`)."""
        values: list[Any] = [None] * len(self._slots)
        values[: len(inputs)] = inputs
        for slot, buffer in self._weight_slots:
            values[slot] = getattr(self, buffer)
        for step in self._steps:
            args = [_resolve(argument, values) for argument in step.args]
            kwargs = {key: _resolve(value, values) for key, value in step.kwargs.items()}
            if step.needs_device:
                kwargs["device"] = inputs[0].device
            values[step.result] = step.function(*args, **kwargs)
            for slot in step.release:
                values[slot] = None
        outputs = tuple(values[slot] for slot in self._outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def _resolve(argument: Any, values: list[Any]) -> Any:
    if isinstance(argument, _Slot):
        return values[argument.index]
    if isinstance(argument, list):
        return [_resolve(item, values) for item in argument]
    return argument


def _positional(op: str) -> frozenset[str]:
    """Parameter names that are passed by position; the rest are keyword-only in the schema."""
    if op not in ATEN:
        return frozenset({"a", "b"})
    return frozenset(a.name for a in ATEN[op]._schema.arguments if not a.kwarg_only)


def run(program: Program, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run `program` once without gradients; always a tuple, also for one output."""
    with torch.inference_mode():
        result = ProgramModule(program)(*inputs)
    return result if isinstance(result, tuple) else (result,)
