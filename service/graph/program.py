"""A program: an eval-mode graph of ATen operators together with its weights, as plain data.

A program is never changed in place; passes build a new one. Values are named; a value is an input,
a weight, or what a node computes. Only the leading (batch) axis may be of unknown size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TypeAlias

from torch import Tensor

from service.errors import InvalidProgram
from service.graph.operators import DTYPES, OPERATORS


@dataclass(frozen=True)
class Ref:
    """A use of the value called `name`."""

    name: str


@dataclass(frozen=True)
class DType:
    """A dtype as an argument, by its stored name."""

    name: str


Scalar: TypeAlias = bool | int | float | str | None
Argument: TypeAlias = "Ref | DType | Scalar | tuple[Argument, ...]"


@dataclass(frozen=True)
class TensorSpec:
    """Shape (None: the size follows the batch) and dtype name of a named value."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape with every unknown size set to `batch`."""
        return tuple(batch if size is None else size for size in self.shape)


@dataclass(frozen=True)
class Node:
    """One operator call.

    `args` is keyed by the operator's own parameter names, defaults filled in. `shape` is None where
    the value is not a tensor (a size, or several outputs). `source` is the dotted path of the
    module that made the call, for reports.
    """

    name: str
    op: str
    args: Mapping[str, Argument]
    shape: tuple[int | None, ...] | None
    dtype: str | None
    source: str = ""

    @property
    def short(self) -> str:
        """The operator without namespace and overload, for reports: `add` of `aten.add.Tensor`."""
        return self.op.removeprefix("aten.").partition(".")[0]

    def refs(self) -> Iterator[str]:
        """Names of the values this node reads, in argument order, with repetition."""
        return iter(self._reads)

    @cached_property
    def _reads(self) -> tuple[str, ...]:
        return tuple(name for argument in self.args.values() for name in _refs(argument))

    def renamed(self, names: Mapping[str, str]) -> Node:
        """The same call reading `names[x]` wherever it read `x`."""
        return replace(self, args={key: _renamed(value, names) for key, value in self.args.items()})


def _refs(argument: Argument) -> Iterator[str]:
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, tuple):
        for item in argument:
            yield from _refs(item)


def _renamed(argument: Argument, names: Mapping[str, str]) -> Argument:
    if isinstance(argument, Ref):
        return Ref(names.get(argument.name, argument.name))
    if isinstance(argument, tuple):
        return tuple(_renamed(item, names) for item in argument)
    return argument


@dataclass(frozen=True)
class Program:
    """Inputs, nodes in execution order, the names of the outputs, and the weights by name.

    Raises InvalidProgram when a name is used before it is defined, or defined twice.
    """

    inputs: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))
        known = {spec.name for spec in self.inputs} | set(self.weights)
        if len(known) != len(self.inputs) + len(self.weights):
            raise InvalidProgram("An input has the name of a weight or of another input.")
        for node in self.nodes:
            if node.op not in OPERATORS:
                raise InvalidProgram(f"Node {node.name!r} calls {node.op!r}, which is not listed.")
            missing = [name for name in node.refs() if name not in known]
            if missing:
                raise InvalidProgram(f"Node {node.name!r} reads {missing[0]!r} before it exists.")
            if node.name in known:
                raise InvalidProgram(f"The value {node.name!r} is defined twice.")
            known.add(node.name)
        missing = [name for name in self.outputs if name not in known]
        if missing or not self.outputs:
            raise InvalidProgram(f"The outputs {missing} are not computed by any node.")

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values())

    @property
    def parameter_count(self) -> int:
        """Elements of all floating-point weights."""
        return sum(t.numel() for t in self.weights.values() if t.is_floating_point())

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every input, weight and tensor-valued node."""
        known = {spec.name: spec for spec in self.inputs}
        for name, tensor in self.weights.items():
            known[name] = TensorSpec(name, tuple(tensor.shape), str(tensor.dtype)[6:])
        for node in self.nodes:
            if node.shape is not None and node.dtype is not None:
                known[node.name] = TensorSpec(node.name, node.shape, node.dtype)
        return known

    def readers(self) -> dict[str, list[str]]:
        """For every value, the nodes that read it; the outputs count as the reader `""`."""
        readers: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.refs()):
                readers.setdefault(name, []).append(node.name)
        for name in self.outputs:
            readers.setdefault(name, []).append("")
        return readers

    def to(self, dtype: str) -> Program:
        """The same program computing in another floating-point dtype (`float64`, `float32`, …)."""
        torch_dtype = DTYPES[dtype]
        floating = {name for name, kind in DTYPES.items() if kind.is_floating_point}

        def cast(argument: Argument) -> Argument:
            if isinstance(argument, DType) and argument.name in floating:
                return DType(dtype)
            if isinstance(argument, tuple):
                return tuple(cast(item) for item in argument)
            return argument

        def named(name: str | None) -> str | None:
            return dtype if name in floating else name

        return Program(
            inputs=tuple(replace(s, dtype=named(s.dtype) or s.dtype) for s in self.inputs),
            nodes=tuple(
                replace(
                    node,
                    args={key: cast(value) for key, value in node.args.items()},
                    dtype=named(node.dtype),
                )
                for node in self.nodes
            ),
            outputs=self.outputs,
            weights={
                name: tensor.to(torch_dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self.weights.items()
            },
        )

    def pruned(self) -> Program:
        """Without the nodes and weights that no output depends on; inputs stay."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if node.name in needed:
                kept.append(node)
                needed.update(node.refs())
        return Program(
            inputs=self.inputs,
            nodes=tuple(reversed(kept)),
            outputs=self.outputs,
            weights={name: t for name, t in self.weights.items() if name in needed},
        )

    def extract(self, inputs: Sequence[str], outputs: Sequence[str]) -> Program:
        """The part that computes `outputs` from `inputs`, both names of values.

        The batch size of a value outside the part is read from the first input instead. Raises
        InvalidProgram when the part otherwise needs a value that `inputs` does not give.
        """
        specs = self.specs()
        cut = set(inputs)
        return Program(
            inputs=tuple(specs[name] for name in inputs),
            nodes=tuple(self._between(cut, inputs[0], outputs)),
            outputs=tuple(outputs),
            weights={name: t for name, t in self.weights.items() if name not in cut},
        ).pruned()

    def _between(self, cut: set[str], first: str, outputs: Iterable[str]) -> Iterator[Node]:
        needed = set(outputs) - cut
        chosen: list[Node] = []
        for node in reversed(self.nodes):
            if node.name not in needed or node.name in cut:
                continue
            if node.op == "aten.sym_size.int" and node.args["dim"] == 0:
                node = replace(node, args={**node.args, "self": Ref(first)})
            chosen.append(node)
            needed.update(set(node.refs()) - cut)
        return reversed(chosen)
