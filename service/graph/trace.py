"""From a module to a program, through torch.export."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node as FxNode

from service.errors import InvalidProgram, UnsupportedOperator
from service.graph.build import (
    Builder,
    batch_norm_arguments,
    full_arguments,
    is_constant,
    slice_arguments,
)
from service.graph.operators import ATEN, NAME_OF, OPERATORS, PLACEMENT
from service.graph.program import Argument, DType, Program, Ref

_BECAUSE: dict[object, str] = {
    torch.ops.aten._native_batch_norm_legit.no_stats: (
        ": a batch norm without running statistics answers by what else is in the batch"
    ),
    torch.ops.aten.bernoulli.p: ": its result is random",
}
MAX_BATCH = 1 << 16
"""Upper bound on the batch size that torch.export is told about, in rows."""

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_SPLITS = {
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.chunk.default,
}
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
_ARITHMETIC: dict[Callable[..., Any], str] = {
    operator.add: "math.add",
    operator.sub: "math.sub",
    operator.mul: "math.mul",
    operator.floordiv: "math.floordiv",
}


def trace(module: nn.Module, example: tuple[Tensor, ...]) -> Program:
    """Export `module` in eval mode with a dynamic batch (leading) axis on every input.

    `example` holds one tensor per input; its batch size does not matter. Parameters, buffers and
    lifted constants become weights under their own dotted names.

    Raises InvalidProgram when the module cannot be exported, UnsupportedOperator when it uses an
    operator outside the allow-list.
    """
    if module.training:
        raise InvalidProgram(
            "The module is in training mode.", remedy="Call module.eval() before tracing it."
        )
    batch = Dim("batch", min=1, max=MAX_BATCH)
    inputs = tuple(_two_rows(tensor) for tensor in example)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module, inputs, dynamic_shapes=[{0: batch} for _ in inputs], strict=False
            )
    except Exception as error:
        raise InvalidProgram(
            f"torch.export could not trace the module: {_first_line(error)}",
            remedy="Remove control flow that depends on data and fixed batch sizes.",
        ) from error
    return from_exported(exported)


def from_exported(exported: ExportedProgram) -> Program:
    """Translate an exported program, functionalised, into a `Program`."""
    with warnings.catch_warnings():
        # torch 2.13 warns of a deprecation inside itself whenever it copies an exported program.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
        functional = exported.run_decompositions({})
    return _Translation(functional).program()


def _two_rows(tensor: Tensor) -> Tensor:
    """Export specialises sizes 0 and 1, so the batch axis of an example must be longer."""
    if tensor.dim() == 0:
        raise InvalidProgram("An example input is a scalar; inputs need a leading batch axis.")
    return tensor[:1].repeat(2, *[1] * (tensor.dim() - 1))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _Translation:
    """Walks the FX graph once; holds what the walk has named so far."""

    def __init__(self, exported: ExportedProgram) -> None:
        self.exported = exported
        self.names: dict[FxNode, str] = {}
        self.build = Builder()
        self.outputs: tuple[str, ...] = ()

    def program(self) -> Program:
        kinds = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        for fx_node in self.exported.graph.nodes:
            if fx_node.op == "placeholder":
                self._placeholder(fx_node, kinds[fx_node.name])
            elif fx_node.op == "call_function":
                self._call(fx_node)
            elif fx_node.op == "output":
                results = [a for a in fx_node.args[0] if isinstance(a, FxNode)]
                self.outputs = tuple(self.names[node] for node in results)
            else:
                raise InvalidProgram(f"The exported graph has a {fx_node.op!r} node.")
        return self.build.program(self.outputs)

    def _placeholder(self, fx_node: FxNode, spec: Any) -> None:
        if spec.kind is InputKind.USER_INPUT:
            value = fx_node.meta["val"]
            if not isinstance(value, Tensor):
                raise InvalidProgram("Every input of the module must be a tensor.")
            self.names[fx_node] = self.build.input(_shape(value), _dtype(value))
            return
        if spec.target in self.exported.state_dict:
            tensor = self.exported.state_dict[spec.target]
        else:
            tensor = self.exported.constants[spec.target]
        self.names[fx_node] = self.build.weight(spec.target, tensor)

    def _call(self, fx_node: FxNode) -> None:
        target = fx_node.target
        if target is torch.ops.aten.sym_constrain_range_for_size.default or (
            isinstance(target, torch._ops.OpOverload) and "assert" in str(target)
        ):
            return
        if target is operator.getitem:
            self._getitem(fx_node)
        elif target is _BATCH_NORM:
            args = batch_norm_arguments(self._given(fx_node, _BATCH_NORM))
            self._emit(fx_node, "aten.batch_norm", args, value=fx_node.meta["val"][0])
        elif target in _SPLITS:
            self.names[fx_node] = ""  # each part becomes a slice where it is taken
        elif target in _VIEWS:
            # A view asks for strides that hold in the traced layout only; a reshape does not.
            source, shape = (self._argument(value) for value in fx_node.args)
            self._emit(fx_node, "aten.reshape", {"self": source, "shape": shape})
        elif target in _ARITHMETIC:
            args = {
                key: self._argument(value) for key, value in zip("ab", fx_node.args, strict=True)
            }
            self._emit(fx_node, _ARITHMETIC[target], args)
        elif isinstance(target, torch._ops.OpOverload) and target in NAME_OF:
            self._aten(fx_node, NAME_OF[target])
        else:
            name = str(target)
            where = _source(fx_node) or "The module"
            raise UnsupportedOperator(
                f"{where} uses {name}, which programs may not{_BECAUSE.get(target, '')}.",
                operator=name,
            )

    def _given(self, fx_node: FxNode, target: torch._ops.OpOverload) -> dict[str, Argument]:
        names = [parameter.name for parameter in target._schema.arguments]
        given = {**dict(zip(names, fx_node.args, strict=False)), **fx_node.kwargs}
        return {key: self._argument(v) for key, v in given.items() if key not in PLACEMENT}

    def _aten(self, fx_node: FxNode, op: str) -> None:
        args = full_arguments(op, self._given(fx_node, ATEN[op]))
        if is_constant(op, args):
            kwargs = {key: value for key, value in fx_node.kwargs.items() if key not in PLACEMENT}
            self.names[fx_node] = self.build.constant(OPERATORS[op](*fx_node.args, **kwargs))
        else:
            self._emit(fx_node, op, args)

    def _getitem(self, fx_node: FxNode) -> None:
        parent, index = fx_node.args
        assert isinstance(parent, FxNode)
        assert isinstance(index, int)
        if parent.target is _BATCH_NORM:
            if index != 0:
                raise InvalidProgram("A batch norm's saved statistics are read in eval mode.")
            self.names[fx_node] = self.names[parent]
        elif parent.target in _SPLITS:
            self._split_part(fx_node, parent, index)
        else:
            self._emit(fx_node, "getitem", {"a": Ref(self.names[parent]), "b": index})

    def _split_part(self, fx_node: FxNode, parent: FxNode, index: int) -> None:
        whole, dim = parent.args[0], parent.kwargs.get("dim", 0)
        if len(parent.args) > 2:
            dim = parent.args[2]
        assert isinstance(whole, FxNode)
        assert isinstance(dim, int)
        sizes = [part.shape[dim] for part in parent.meta["val"]]
        if not all(isinstance(size, int) for size in sizes):
            raise InvalidProgram("The batch axis is split, so the parts have no known size.")
        start = sum(sizes[:index])
        dim %= len(_shape(whole.meta["val"]))
        args = slice_arguments(self.names[whole], dim, start, start + sizes[index])
        self._emit(fx_node, "aten.slice.Tensor", args)

    def _emit(self, fx_node: FxNode, op: str, args: dict[str, Argument], value: Any = None) -> None:
        value = fx_node.meta.get("val") if value is None else value
        kind = (_shape(value), _dtype(value)) if isinstance(value, Tensor) else None
        self.names[fx_node] = self.build.emit(op, args, kind, _source(fx_node))

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, FxNode):
            return Ref(self.names[value])
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, torch.dtype):
            return DType(str(value).removeprefix("torch."))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise InvalidProgram(f"An argument of type {type(value).__name__} cannot be stored.")


def _shape(value: Tensor) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _source(fx_node: FxNode) -> str:
    """The dotted path of the innermost module, without export's marks for repeated calls."""
    stack = fx_node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if "hook" not in path:
            return str(path).partition("@")[0]
    return ""
