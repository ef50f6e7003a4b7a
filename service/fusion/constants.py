"""Folding everything that depends on parameters alone, in float64.

This is what makes online re-parameterization an ordinary case: OREPA generates its kernel from
parameters on every forward pass (block squeezing, Hu et al. 2022, §3.3), so in eval mode the
generated kernel is one constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from service.fusion.memory import Trimmer
from service.graph.operators import ATEN, DTYPES, OPERATORS
from service.graph.program import Argument, DType, Node, Program, Ref
from service.graph.writes import shares_memory


class Constants(Mapping[str, Tensor]):
    """Weights, and nodes that read nothing but constants, by name; floating ones in float64.

    Values are computed when first read. They are kept, but for those that only one other constant
    reads; weights, and views of them, are converted at every reading and not kept. `computed` tells
    the nodes among the names, `expansions` those that rules may take for constants of batch size 1
    although they follow the batch: to other readers they are nodes.
    """

    def __init__(self, program: Program) -> None:
        self._weights = program.weights
        self._values: dict[str, Any] = {}
        self._pending: dict[str, Node] = {}
        self._expansions: set[str] = set()
        self._trimmer = Trimmer()
        for node in program.nodes:
            reads = list(node.refs())
            if self._is_batch_expansion(node):
                self._expansions.add(node.name)
                self._pending[node.name] = node
            elif all(name in self and name not in self._expansions for name in reads):
                self._pending[node.name] = node
        self._passing = self._read_once(program)

    def _is_batch_expansion(self, node: Node) -> bool:
        """`expand` of a constant along the batch, or a `copy` of one: for rules, that constant."""
        source = {"aten.expand": "self", "aten.copy": "src"}.get(node.op)
        value = node.args[source] if source else None
        if not isinstance(value, Ref) or value.name not in self:
            return False
        return value.name in self._expansions or any(name not in self for name in node.refs())

    def _read_once(self, program: Program) -> frozenset[str]:
        """Computed values that one other constant reads and nothing else."""
        readers = program.readers()
        return frozenset(
            name
            for name in self._pending
            if len(readers.get(name, ())) == 1 and readers[name][0] in self._pending
        )

    @property
    def computed(self) -> frozenset[str]:
        """Names of the nodes among the constants, batch expansions included, weights not."""
        return frozenset(self._pending)

    @property
    def expansions(self) -> frozenset[str]:
        """Names of the nodes that repeat a constant along the batch; see the class."""
        return frozenset(self._expansions)

    def settled(self, name: str) -> bool:
        """Whether the value is the same for every batch, so that it can be stored."""
        return name in self and name not in self._expansions

    def __contains__(self, name: object) -> bool:
        return name in self._weights or name in self._pending

    def copy(self, name: str) -> Tensor:
        """A constant as a new tensor, floating ones in float64."""
        value = self._weights[name] if name in self._weights else self[name]
        self._trimmer.made(8 * value.numel())
        return torch.clone(value) if value.dtype is torch.float64 else _widened(value)

    def shape(self, name: str) -> tuple[int, ...]:
        """A constant's shape, without converting a stored weight or computing the value."""
        if name in self._weights:
            return tuple(self._weights[name].shape)
        known = self._pending[name].shape
        if known is None or None in known:
            return tuple(self[name].shape)
        return tuple(size for size in known if size is not None)

    def __iter__(self) -> Iterator[str]:
        yield from self._weights
        yield from self._pending

    def __len__(self) -> int:
        return len(self._weights) + len(self._pending)

    def __getitem__(self, name: str) -> Any:
        if name in self._weights:
            return _widened(self._weights[name])
        if name not in self._values:
            node = self._pending[name]
            with torch.no_grad():
                value = self._compute(node)
            if shares_memory(node.op) and self._weights.keys() >= set(node.refs()):
                return value  # no more than a weight in another order: not worth a float64 copy
            for read in self._passing.intersection(node.refs()):
                self._values.pop(read, None)
            self._values[name] = value
        return self._values[name]

    def _compute(self, node: Node) -> Any:
        if node.op == "aten.copy":
            return self._resolve(node.args["src"])
        if node.op == "aten.expand":
            source = self._resolve(node.args["self"])
            sizes = node.args["size"]
            assert isinstance(sizes, tuple)
            known = [1 if isinstance(s, Ref) and s.name not in self else s for s in sizes]
            return source.expand([self._resolve(size) for size in known])
        keyword = (
            {a.name for a in ATEN[node.op]._schema.arguments if a.kwarg_only}
            if node.op in ATEN
            else set()
        )
        args = [self._resolve(v) for key, v in node.args.items() if key not in keyword]
        kwargs = {key: self._resolve(v) for key, v in node.args.items() if key in keyword}
        result = OPERATORS[node.op](*args, **kwargs)
        return _widened(result) if isinstance(result, Tensor) else result

    def _resolve(self, argument: Argument) -> Any:
        if isinstance(argument, Ref):
            return self[argument.name]
        if isinstance(argument, DType):
            dtype = DTYPES[argument.name]
            return torch.float64 if dtype.is_floating_point else dtype
        if isinstance(argument, tuple):
            return [self._resolve(item) for item in argument]
        return argument


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
