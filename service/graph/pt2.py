"""From a torch.export archive (`.pt2`) to a program, without torch.export.load.

torch's own loader unpickles sample inputs, constants and flagged tensors, gives size expressions
and guards to sympy and to the compiler, resolves operator targets by attribute, and pastes names
into generated code. Here the graph is data: operators are looked up in the allow-list, names are
ours, shapes are computed again on meta tensors for two batch sizes, and an expression may only be
the batch symbol, alone or times a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.errors import InvalidProgram, UnsupportedOperator, out_of_memory
from service.graph.build import (
    PASSING,
    Builder,
    Kind,
    check_eval,
    full_arguments,
    is_constant,
    slice_arguments,
)
from service.graph.meta import evaluate
from service.graph.operators import ATEN, DTYPES, OPERATORS, PLACEMENT
from service.graph.program import Argument, DType, Program, Ref
from service.graph.pt2_archive import (
    DTYPE_OF,
    Places,
    Pt2Archive,
    Pt2Limits,
    fields,
    items,
    natural,
    tensor_kind,
    union,
)
from service.graph.pt2_fields import (
    batch_symbol,
    module_path,
    operator_name,
    output_names,
    scalar_of,
    text_of,
)
from service.graph.pt2_spellings import SPELLINGS, named
from service.graph.writes import Writes, functional

SCHEMA_MAJOR = 8
"""Version of torch/_export/serde/schema.py that is read; minor versions only add fields."""

_PROBES = (3, 5)
"""Batch sizes at which every shape is computed; primes, rarely a channel count."""
_CHECKS = frozenset(
    f"torch.ops.aten.{name}"
    for name in (
        *("_assert_tensor_metadata.default", "_assert_scalar.default", "_assert_async.msg"),
        *("sym_constrain_range.default", "sym_constrain_range_for_size.default"),
    )
)
"""Calls that compute nothing; shapes are checked here anyway."""
_CASTS = frozenset({"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device"})
_SPLITS = frozenset({"aten.split.Tensor", "aten.split_with_sizes", "aten.chunk"})

_WEIGHT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,255}")
_SYMBOL = r"Symbol\('(s[0-9]{1,6})'(?:, positive=True)?(?:, integer=True)?\)"
_EXPRESSION = re.compile(rf"(?:Mul\(Integer\(([0-9]{{1,9}})\), )?{_SYMBOL}(\))?")


def load_pt2(path: Path, places: Places, limits: Pt2Limits | None = None) -> Program:
    """Read the archive at `path`, whose stored entries lie at `places`, as a program.

    `places` maps each entry's name below the archive's folder to its first byte and its length,
    as a strict listing of the zip found them. The export may be for training or functionalised;
    it must be of an eval-mode module with a dynamic batch axis first in every input, and nothing
    else dynamic. A bound on the batch that the exporter declared is read but not kept.

    Raises UnsupportedOperator for an operator outside the allow-list, LimitExceeded for sizes
    beyond the file or `limits`, InvalidProgram for everything else, each naming what is outside.
    """
    limits = limits or Pt2Limits()
    archive = Pt2Archive(path, places, limits)
    return _Translation(archive, limits).program()


class _Translation:
    """Walks the archive's graph once. File names are only ever keys into what the walk knows."""

    def __init__(self, archive: Pt2Archive, limits: Pt2Limits) -> None:
        document = archive.graph
        version = fields(document.get("schema_version"), "The schema version")
        if version.get("major") != SCHEMA_MAJOR:
            raise InvalidProgram(
                f"The archive has schema {str(version.get('major'))[:20]}; {SCHEMA_MAJOR} is read.",
                remedy="Export the module again with torch 2.13.",
            )
        module = fields(document.get("graph_module"), "The graph module")
        self.graph = fields(module.get("graph"), "The graph")
        self.signature = fields(module.get("signature"), "The signature")
        self.kinds = fields(self.graph.get("tensor_values"), "The table of tensors")
        self.symbol = batch_symbol(document.get("range_constraints"))
        self.tensors = archive.tensors()
        self.limits = limits
        self.build = Builder()
        self.names: dict[str, str] = {}  # name in the file -> name in the program
        self.bound: dict[str, list[str]] = {}  # the other way round
        self.probes: tuple[dict[str, Any], ...] = tuple({} for _ in _PROBES)
        self.writes = Writes()
        self.constant_bytes = 0

    def program(self) -> Program:
        specs = items(self.signature.get("input_specs"), "The signature's inputs")
        for spec in specs:
            self._input(*union(spec, "An input"))
        if not self.build.inputs:
            raise InvalidProgram("The exported module takes no tensor.")
        nodes = items(self.graph.get("nodes"), "The graph's nodes")
        self.limits.check("graph_nodes", len(nodes), "Operator calls of the graph")
        for node in nodes:
            self._node(fields(node, "A node"))
        outputs = items(self.signature.get("output_specs"), "The signature's outputs")
        return self.build.program([self._output(*union(spec, "An output")) for spec in outputs])

    # Inputs and outputs --------------------------------------------------------------------------

    def _input(self, kind: str, spec: Any) -> None:
        argument = fields(spec, "An input").get("arg")
        if kind == "user_input":
            tag, argument = union(argument, "An input")
            if tag != "as_tensor":
                raise InvalidProgram("Every input of the module must be a tensor.")
            file_name = text_of(fields(argument, "An input").get("name"), "An input's name")
            self._user_input(file_name)
            return
        name_field = {
            "parameter": "parameter_name",
            "buffer": "buffer_name",
            "tensor_constant": "tensor_constant_name",
        }.get(kind)
        if name_field is None:
            raise InvalidProgram(f"The program takes an input of kind {kind[:40]!r}.")
        name = text_of(spec.get(name_field), "A weight's name")
        if not _WEIGHT_NAME.fullmatch(name):
            raise InvalidProgram(f"{name[:80]!r} is not a name that a weight may have.")
        if name not in self.tensors:
            raise InvalidProgram(f"The archive holds no tensor {name[:80]!r}.")
        file_name = text_of(fields(argument, "An input").get("name"), "An input's name")
        tensor = self.tensors[name]
        self.build.weight(name, tensor)
        meta = tensor.detach().to("meta")
        self._define(file_name, name, [meta for _ in _PROBES])
        self.writes.outer(name)

    def _user_input(self, file_name: str) -> None:
        what = f"Input {len(self.build.inputs)}"
        dtype, sizes = tensor_kind(fields(self.kinds.get(file_name), what), what)
        if not sizes or self._coefficient(sizes[0], what) != (1, 0):
            raise InvalidProgram(
                f"{what} has no dynamic batch axis.",
                remedy="Export with dynamic_shapes=[{0: torch.export.Dim('batch')}] "
                "and an example of two samples.",
            )
        rest = tuple(natural(size, what) for size in sizes[1:])
        name = self.build.input((None, *rest), _dtype_name(dtype))
        metas = [torch.empty((batch, *rest), dtype=dtype, device="meta") for batch in _PROBES]
        self._define(file_name, name, metas)
        self.writes.outer(name)

    def _output(self, kind: str, spec: Any) -> str:
        if kind != "user_output":
            raise InvalidProgram(
                f"The program has an effect besides its outputs: {kind[:40]!r}.",
                remedy="Export the module in eval mode.",
            )
        tag, argument = union(fields(spec, "An output").get("arg"), "An output")
        if tag != "as_tensor":
            raise InvalidProgram("Every output of the module must be a tensor.")
        return self._read(fields(argument, "An output").get("name")).name

    # Values --------------------------------------------------------------------------------------

    def _define(self, file_name: str, name: str, results: list[Any]) -> None:
        """Bind a name of the file, after comparing what the file says of it with `results`."""
        if file_name in self.names:
            raise InvalidProgram(f"The value {file_name[:80]!r} is defined twice.")
        if isinstance(results[0], Tensor):
            self._compare(file_name, results)
        self._bind(file_name, name)
        for probe, result in zip(self.probes, results, strict=True):
            probe[name] = result

    def _bind(self, file_name: str, name: str) -> None:
        self.names[file_name] = name
        self.bound.setdefault(name, []).append(file_name)

    def _compare(self, file_name: str, results: list[Tensor]) -> None:
        what = f"The value {file_name[:80]!r}"
        dtype, sizes = tensor_kind(fields(self.kinds.get(file_name), what), what)
        said = [self._coefficient(size, what) for size in sizes]
        for batch, result in zip(_PROBES, results, strict=True):
            expected = tuple(factor * batch + fixed for factor, fixed in said)
            if tuple(result.shape) != expected or result.dtype != dtype:
                raise InvalidProgram(
                    f"{what} is said to be {expected} {dtype} for a batch of {batch}, "
                    f"but is {tuple(result.shape)} {result.dtype}."
                )

    def _coefficient(self, size: Any, what: str) -> tuple[int, int]:
        """A size as (times the batch, plus): a number, or the batch symbol times a number."""
        tag, content = union(size, what)
        if tag == "as_int":
            return 0, natural(size, what)
        text = fields(content, what).get("expr_str") if tag == "as_expr" else None
        found = _EXPRESSION.fullmatch(text) if isinstance(text, str) else None
        if found is None or (found[1] is None) != (found[3] is None):
            raise InvalidProgram(
                f"{what} has the size {str(text)[:80]!r}; only numbers and the batch are read."
            )
        if found[2] != self.symbol:
            raise InvalidProgram(
                f"{what} has another dynamic size than the batch, {found[2]!r}.",
                remedy="Export with the batch axis alone dynamic.",
            )
        return int(found[1] or 1), 0

    def _read(self, file_name: Any) -> Ref:
        name = self.names.get(text_of(file_name, "A value's name"))
        if name is None:
            raise InvalidProgram(f"The value {file_name[:80]!r} is read but not computed.")
        self.writes.check_read(name)
        return Ref(name)

    # Calls ---------------------------------------------------------------------------------------

    def _node(self, node: dict[str, Any]) -> None:
        target = text_of(node.get("target"), "A node's target")
        if target in _CHECKS:
            return
        source, outputs = module_path(node.get("metadata")), list(output_names(node))
        op = operator_name(target)
        pure = functional(op)
        if pure is None and op not in OPERATORS and op not in SPELLINGS and op not in _CASTS:
            raise UnsupportedOperator(
                f"{source or 'The program'} uses {target[:120]!r}, which programs may not.",
                operator=target[:120],
            )
        given = dict(self._arguments(node, target))
        if pure is not None:
            self._in_place(op, pure, given, outputs, source)
        else:
            self._call(op, given, outputs, source)

    def _call(self, op: str, given: dict[str, Argument], outputs: list[str], source: str) -> None:
        if op in SPELLINGS:
            op, given = SPELLINGS[op](self.probes, given)
        elif op in ATEN and op not in _CASTS:
            given = full_arguments(op, given)
        elif op not in ATEN and op not in _CASTS:
            given = {key: named(given, "a", "b")[key] for key in ("a", "b")}
        check_eval(op, given)
        if op in PASSING:
            self._same(given, outputs)
        elif op in _CASTS:
            self._cast(given, outputs, source)
        elif op in _SPLITS:
            self._split(op, given, outputs, source)
        else:
            self._emit(op, given, outputs, source)

    def _emit(self, op: str, args: dict[str, Argument], outputs: list[str], source: str) -> str:
        """Add the call and bind its outputs; returns the name of its value."""
        if op == "aten.unbind.int":
            self._check_parts(args, outputs)
        results = self._evaluate(op, args)
        if is_constant(op, args):
            name = self._constant(op, args, results[0])
        else:
            name = self.build.emit(op, args, _kind(results), source)
            self.writes.result(name, op, (ref.name for ref in _refs(args)))
        for probe, result in zip(self.probes, results, strict=True):
            probe[name] = result
        if isinstance(results[0], (list, tuple)):
            self._parts(name, results, outputs, source)
        elif outputs:
            self._define(outputs[0], name, results)
        return name

    def _parts(self, name: str, results: list[Any], outputs: list[str], source: str) -> None:
        for index, output in enumerate(outputs[: len(results[0])]):
            part = [result[index] for result in results]
            args: dict[str, Argument] = {"a": Ref(name), "b": index}
            item = self.build.emit("getitem", args, _kind(part), source)
            self.writes.result(item, "aten.unbind.int", (name,))  # as a view, which it may be
            self._define(output, item, part)

    def _in_place(
        self, op: str, pure: str, given: dict[str, Argument], outputs: list[str], source: str
    ) -> None:
        parameters = ATEN[pure]._schema.arguments
        if "self" in given and "self" not in {parameter.name for parameter in parameters}:
            given = {parameters[0].name: given.pop("self"), **given}  # as dropout_ and dropout
        args = full_arguments(pure, given)
        check_eval(pure, args)
        first = next(iter(args.values()))
        if not isinstance(first, Ref):
            raise InvalidProgram(f"{op!r} does not say what it changes.")
        if pure in PASSING:
            self._same(args, outputs)
            return
        before, after = ([p[first.name] for p in self.probes], self._evaluate(pure, args))
        if _kind(before) != _kind(after):
            raise UnsupportedOperator(f"{op!r} changes a tensor's shape or type.", operator=op)
        name = self.build.emit(pure, args, _kind(after), source)
        self.writes.overwrite(first.name, name, op)
        for probe, result in zip(self.probes, after, strict=True):
            probe[name] = result
        for file_name in self.bound.pop(first.name, []):
            self._bind(file_name, name)
        if outputs:
            self._define(outputs[0], name, after)

    def _same(self, args: Mapping[str, Argument], outputs: list[str]) -> None:
        argument = next(iter(args.values()))
        if not isinstance(argument, Ref) or not outputs:
            raise InvalidProgram("A call that passes a tensor on has no tensor.")
        self._define(outputs[0], argument.name, [probe[argument.name] for probe in self.probes])

    def _cast(self, given: dict[str, Argument], outputs: list[str], source: str) -> None:
        """`to` copies when the dtype changes, and returns the tensor itself otherwise."""
        tensor, dtype = given.get("self"), given.get("dtype")
        unknown = set(given) - {"self", "dtype", "non_blocking", "copy"}
        if not isinstance(tensor, Ref) or unknown or given.get("copy", False) is not False:
            raise InvalidProgram("A cast has no tensor, asks for a copy, or has an odd argument.")
        current = self.probes[0].get(tensor.name)
        if not isinstance(current, Tensor):
            raise InvalidProgram("A cast has no tensor.")
        if dtype is None or (isinstance(dtype, DType) and DTYPES[dtype.name] == current.dtype):
            self._same({"self": tensor}, outputs)
            return
        args = full_arguments("aten._to_copy", {"self": tensor, "dtype": dtype})
        self._emit("aten._to_copy", args, outputs, source)

    def _split(self, op: str, args: dict[str, Argument], outputs: list[str], source: str) -> None:
        whole, dim = args["self"], args["dim"]
        value = self.probes[0].get(whole.name) if isinstance(whole, Ref) else None
        if not isinstance(value, Tensor) or not isinstance(whole, Ref) or type(dim) is not int:
            raise InvalidProgram("A split has no tensor or no axis.")
        rank = value.dim()
        if not -rank <= dim < rank or value.shape[dim] != self.probes[1][whole.name].shape[dim]:
            raise InvalidProgram("The batch axis is split, so the parts have no known size.")
        sizes = _part_sizes(op, args, value.shape[dim], len(outputs))
        start = 0
        for size, output in zip(sizes, outputs, strict=True):
            part = slice_arguments(whole.name, dim % rank, start, start + size)
            self._emit("aten.slice.Tensor", part, [output], source)
            start += size

    def _check_parts(self, args: Mapping[str, Argument], outputs: list[str]) -> None:
        """Unbinding makes as many tensors as the axis is long, so that is compared first."""
        whole, dim = args["self"], args["dim"]
        value = self.probes[0].get(whole.name) if isinstance(whole, Ref) else None
        if not isinstance(value, Tensor) or type(dim) is not int or not value.dim():
            raise InvalidProgram("An unbind has no tensor or no axis.")
        if value.shape[dim % value.dim()] != len(outputs):
            raise InvalidProgram("An unbind does not name every part.")

    def _evaluate(self, op: str, args: Mapping[str, Argument]) -> list[Any]:
        try:
            results = [evaluate(op, args, probe) for probe in self.probes]
        except Exception as error:
            if out_of_memory(error):
                raise
            first = str(error).strip().split("\n", 1)[0][:200]
            raise InvalidProgram(f"{op} does not fit its arguments: {first}") from None
        for value in results[0] if isinstance(results[0], (list, tuple)) else results[:1]:
            if isinstance(value, Tensor):
                size = value.numel() * value.element_size()
                self.limits.check("graph_value_bytes", size, f"Bytes of a value of {op}")
        return results

    def _constant(self, op: str, args: Mapping[str, Argument], shape: Tensor) -> str:
        self.constant_bytes += shape.numel() * shape.element_size()
        self.limits.check("graph_constant_bytes", self.constant_bytes, "Bytes of made constants")
        given = {key: DTYPES[v.name] if isinstance(v, DType) else v for key, v in args.items()}
        keyword = {a.name for a in ATEN[op]._schema.arguments if a.kwarg_only}
        tensor = OPERATORS[op](
            *(value for key, value in given.items() if key not in keyword),
            **{key: value for key, value in given.items() if key in keyword},
        )
        name = self.build.constant(tensor)
        self.writes.result(name, op, ())
        return name

    # Arguments -----------------------------------------------------------------------------------

    def _arguments(self, node: Mapping[str, Any], target: str) -> Iterator[tuple[str, Argument]]:
        seen = set()
        for item in items(node.get("inputs"), f"The call of {target[:80]!r}"):
            entry = fields(item, "An argument")
            name = text_of(entry.get("name"), "An argument's name")
            if name in seen:
                raise InvalidProgram(f"{target[:80]!r} is given {name[:80]!r} twice.")
            seen.add(name)
            if name not in PLACEMENT:
                yield name, self._argument(*union(entry.get("arg"), "An argument"), target)

    def _argument(self, tag: str, content: Any, target: str) -> Argument:
        what = f"An argument of {target[:80]!r}"
        match tag:
            case "as_none":
                return None
            case "as_tensor":
                return self._read(fields(content, what).get("name"))
            case "as_tensors":
                names = [fields(item, what).get("name") for item in items(content, what)]
                return tuple(self._read(name) for name in names)
            case "as_optional_tensor" | "as_sym_int":
                return self._union_item(content, what)
            case "as_optional_tensors" | "as_sym_ints":
                return tuple(self._union_item(item, what) for item in items(content, what))
            case "as_int" | "as_float" | "as_bool" | "as_string":
                return scalar_of(tag, content, what)
            case "as_ints" | "as_floats" | "as_bools":
                return tuple(scalar_of(tag[:-1], item, what) for item in items(content, what))
            case "as_scalar_type":
                if type(content) is int and content in DTYPE_OF:
                    return DType(_dtype_name(DTYPE_OF[content]))
        raise InvalidProgram(f"{what} is of the kind {tag[:40]!r}, which is not read.")

    def _union_item(self, item: Any, what: str) -> Argument:
        tag, content = union(item, what)
        if tag == "as_none":
            return None
        if tag == "as_tensor":
            return self._read(fields(content, what).get("name"))
        if tag == "as_name":
            return self._read(content)
        if tag == "as_int":
            return scalar_of(tag, content, what)
        raise InvalidProgram(f"{what} is of the kind {tag[:40]!r}, which is not read.")


def _part_sizes(op: str, args: Mapping[str, Argument], whole: int, parts: int) -> list[int]:
    """Sizes of the parts of a split along an axis of `whole`; there must be `parts` of them."""
    if op == "aten.split_with_sizes":
        asked = args["split_sizes"]
        listed = asked if isinstance(asked, tuple) else ()
        sizes = [size for size in listed if type(size) is int and size >= 0]
        fits = len(sizes) == len(listed) == parts and sum(sizes) == whole
    else:
        count = args["split_size" if op == "aten.split.Tensor" else "chunks"]
        if type(count) is not int or count < 1 or whole < 1:
            raise InvalidProgram(f"{op} has no usable number of parts.")
        step = count if op == "aten.split.Tensor" else -(-whole // count)
        fits = -(-whole // step) == parts
        sizes = [min(step, whole - start) for start in range(0, step * parts, step)] * fits
    if not fits:
        raise InvalidProgram(f"{op} does not name every part, or its parts are not the whole.")
    return sizes


def _refs(args: Mapping[str, Argument]) -> Iterator[Ref]:
    for argument in args.values():
        for item in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(item, Ref):
                yield item


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(results: list[Any]) -> Kind:
    """Shape (None where it follows the batch) and dtype of one value seen at every probe."""
    first, second = results
    if not isinstance(first, Tensor):
        return None
    pairs = zip(first.shape, second.shape, strict=True)
    return tuple(a if a == b else None for a, b in pairs), _dtype_name(first.dtype)
