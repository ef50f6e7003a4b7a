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

from service.errors import InvalidProgram, UnsupportedOperator, out_of_memory
from service.graph.build import (
    PASSING,
    Builder,
    batch_norm_arguments,
    check_eval,
    full_arguments,
    is_constant,
    slice_arguments,
)
from service.graph.operators import ATEN, NAME_OF, OPERATORS, PLACEMENT
from service.graph.program import Argument, DType, Program, Ref
from service.graph.writes import Writes, functional

_BECAUSE: dict[object, str] = {
    torch.ops.aten._native_batch_norm_legit.no_stats: (
        ": a batch norm without running statistics answers by what else is in the batch"
    ),
    torch.ops.aten.bernoulli.p: ": its result is random",
}
MAX_BATCH = 1 << 16
"""Upper bound on the batch size that torch.export is told about, in rows."""

_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_CASTS = {
    torch.ops.aten.to.dtype,
    torch.ops.aten.to.dtype_layout,
    torch.ops.aten.to.device,
}
_SPLITS = {
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.chunk.default,
}
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
_ANY_VIEW = "aten.unbind.int"
"""What stands for a part of several outputs, which may be views."""
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
        if out_of_memory(error):
            raise
        raise InvalidProgram(
            f"torch.export could not trace the module: {_first_line(error)}",
            remedy="Remove control flow that depends on data and fixed batch sizes.",
        ) from error
    return from_exported(exported)


def from_exported(exported: ExportedProgram) -> Program:
    """Translate an exported program into a `Program`.

    Most graphs translate as they are. Those with another spelling of an operator, or with in-place
    calls that only functionalisation unravels, are traced once more by PyTorch for it, which takes
    about twice as long as the export.
    """
    try:
        return _Translation(exported).program()
    except (InvalidProgram, UnsupportedOperator):
        pass
    with warnings.catch_warnings():
        # torch 2.13 warns of a deprecation inside itself whenever it copies an exported program.
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
        functionalised = exported.run_decompositions({})
    return _Translation(functionalised).program()


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
        self.bound: dict[str, list[FxNode]] = {}  # the other way round
        self.build = Builder()
        self.writes = Writes()
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
                self.outputs = tuple(self._read(node).name for node in results)
            else:
                raise InvalidProgram(f"The exported graph has a {fx_node.op!r} node.")
        return self.build.program(self.outputs)

    def _bind(self, fx_node: FxNode, name: str) -> None:
        self.names[fx_node] = name
        self.bound.setdefault(name, []).append(fx_node)

    def _read(self, fx_node: FxNode) -> Ref:
        name = self.names[fx_node]
        self.writes.check_read(name)
        return Ref(name)

    def _placeholder(self, fx_node: FxNode, spec: Any) -> None:
        if spec.kind is InputKind.USER_INPUT:
            value = fx_node.meta["val"]
            if not isinstance(value, Tensor):
                raise InvalidProgram("Every input of the module must be a tensor.")
            name = self.build.input(_shape(value), _dtype(value))
        else:
            stored = self.exported.state_dict
            tensors = stored if spec.target in stored else self.exported.constants
            name = self.build.weight(spec.target, tensors[spec.target])
        self._bind(fx_node, name)
        self.writes.outer(name)

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
            self._bind(fx_node, "")  # each part becomes a slice where it is taken
        elif target in _VIEWS:
            # A view asks for strides that hold in the traced layout only; a reshape does not.
            source, shape = (self._argument(value) for value in fx_node.args)
            self._emit(fx_node, "aten.reshape", {"self": source, "shape": shape})
        elif target in _ARITHMETIC:
            args = {
                key: self._argument(value) for key, value in zip("ab", fx_node.args, strict=True)
            }
            self._emit(fx_node, _ARITHMETIC[target], args)
        elif target in _CASTS:
            self._cast(fx_node)
        elif isinstance(target, torch._ops.OpOverload) and target in NAME_OF:
            self._aten(fx_node, NAME_OF[target])
        elif isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            self._in_place(fx_node, target)
        else:
            raise _unlisted(fx_node)

    def _given(self, fx_node: FxNode, target: torch._ops.OpOverload) -> dict[str, Argument]:
        names = [parameter.name for parameter in target._schema.arguments]
        given = {**dict(zip(names, fx_node.args, strict=False)), **fx_node.kwargs}
        return {key: self._argument(v) for key, v in given.items() if key not in PLACEMENT}

    def _aten(self, fx_node: FxNode, op: str) -> None:
        args = full_arguments(op, self._given(fx_node, ATEN[op]))
        check_eval(op, args)
        if is_constant(op, args):
            kwargs = {key: value for key, value in fx_node.kwargs.items() if key not in PLACEMENT}
            name = self.build.constant(OPERATORS[op](*fx_node.args, **kwargs))
            self.writes.result(name, op, ())
            self._bind(fx_node, name)
        elif op in PASSING:
            self._pass_on(fx_node)
        else:
            args = batch_norm_arguments(args) if op == "aten.batch_norm" else args
            self._emit(fx_node, op, args)

    def _pass_on(self, fx_node: FxNode) -> None:
        """The call returns its first argument itself."""
        source = fx_node.args[0]
        assert isinstance(source, FxNode)
        self._bind(fx_node, self._read(source).name)

    def _cast(self, fx_node: FxNode) -> None:
        """`to` copies when the dtype changes, and returns the tensor itself otherwise."""
        source, value = fx_node.args[0], fx_node.meta["val"]
        assert isinstance(source, FxNode)
        if True in (*fx_node.args[3:], fx_node.kwargs.get("copy")):
            raise InvalidProgram("A cast asks for a copy.")
        if source.meta["val"].dtype == value.dtype:
            self._pass_on(fx_node)
            return
        given = {"self": self._argument(source), "dtype": DType(_dtype(value))}
        self._emit(fx_node, "aten._to_copy", full_arguments("aten._to_copy", given))

    def _in_place(self, fx_node: FxNode, target: torch._ops.OpOverload) -> None:
        name = f"aten.{target._opname}"
        name += "" if target._overloadname == "default" else f".{target._overloadname}"
        pure, old = functional(name), fx_node.args[0] if fx_node.args else None
        if pure is None or not isinstance(old, FxNode):
            raise _unlisted(fx_node)
        kinds = {_dtype(a.meta["val"]) for a in fx_node.all_input_nodes if _is_tensor(a)}
        if len(kinds) > 1 or _shape(old.meta["val"]) != _shape(fx_node.meta["val"]):
            raise UnsupportedOperator(f"{name!r} changes a tensor's shape or type.", operator=name)
        args = full_arguments(pure, self._given(fx_node, ATEN[pure]))
        check_eval(pure, args)
        if pure in PASSING:
            self._pass_on(fx_node)
            return
        before = self.names[old]
        self._emit(fx_node, pure, args)
        after = self.names[fx_node]
        self.writes.overwrite(before, after, name)
        for changed in self.bound.pop(before):
            self._bind(changed, after)

    def _getitem(self, fx_node: FxNode) -> None:
        parent, index = fx_node.args
        assert isinstance(parent, FxNode)
        assert isinstance(index, int)
        if parent.target is _BATCH_NORM:
            if index != 0:
                raise InvalidProgram("A batch norm's saved statistics are read in eval mode.")
            self._bind(fx_node, self.names[parent])
        elif parent.target in _SPLITS:
            self._split_part(fx_node, parent, index)
        else:
            self._emit(fx_node, "getitem", {"a": self._read(parent), "b": index})
            self.writes.result(self.names[fx_node], _ANY_VIEW, (self.names[parent],))

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
        args = slice_arguments(self._read(whole).name, dim, start, start + sizes[index])
        self._emit(fx_node, "aten.slice.Tensor", args)

    def _emit(self, fx_node: FxNode, op: str, args: dict[str, Argument], value: Any = None) -> None:
        value = fx_node.meta.get("val") if value is None else value
        kind = (_shape(value), _dtype(value)) if isinstance(value, Tensor) else None
        name = self.build.emit(op, args, kind, _source(fx_node))
        self.writes.result(name, op, (self.names[node] for node in fx_node.all_input_nodes))
        self._bind(fx_node, name)

    def _argument(self, value: Any) -> Argument:
        if isinstance(value, FxNode):
            return self._read(value)
        if isinstance(value, (list, tuple)):
            return tuple(self._argument(item) for item in value)
        if isinstance(value, torch.dtype):
            return DType(str(value).removeprefix("torch."))
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise InvalidProgram(f"An argument of type {type(value).__name__} cannot be stored.")


def _unlisted(fx_node: FxNode) -> UnsupportedOperator:
    name = str(fx_node.target)
    where = _source(fx_node) or "The module"
    return UnsupportedOperator(
        f"{where} uses {name}, which programs may not{_BECAUSE.get(fx_node.target, '')}.",
        operator=name,
    )


def _is_tensor(fx_node: FxNode) -> bool:
    return isinstance(fx_node.meta.get("val"), Tensor)


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
