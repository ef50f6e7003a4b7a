"""Bundles: one safetensors file whose metadata holds the graph as JSON.

Nothing in a bundle is executed or unpickled. Loading checks every field, operator, argument kind,
reference and dtype, then recomputes every shape without allocating (meta tensors) and compares.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from service.errors import (
    DuplicateKey,
    InvalidProgram,
    LimitExceeded,
    NestingTooDeep,
    UnsupportedOperator,
    out_of_memory,
)
from service.graph.meta import evaluate
from service.graph.operators import ATEN, DTYPES, OPERATORS
from service.graph.program import Argument, DType, Node, Program, Ref, TensorSpec

METADATA_KEY = "foldserve.program"
FORMAT = 1
MAX_NODES = 20_000
"""Largest graph that is read, in nodes; each takes about 0.2 ms to check."""
MAX_VALUE_BYTES = 8 << 30
"""Largest value inside the graph for `_PROBE_BATCH` samples, in bytes."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,255}")
_PROBE_BATCH = 3
"""Batch size at which recorded shapes are checked; prime and rarely a channel count."""


def save_program(program: Program, path: Path) -> None:
    """Write `program` to `path` as a bundle. Tensors that share storage are written out apart."""
    tensors = {
        name: tensor.detach().contiguous().clone() for name, tensor in program.weights.items()
    }
    document = json.dumps(_program_to_json(program), separators=(",", ":"))
    save_file(tensors, path, metadata={METADATA_KEY: document, "format": "pt"})


def load_program(path: Path) -> Program:
    """Read a bundle.

    Raises InvalidProgram, DuplicateKey or NestingTooDeep when anything in it is not exactly as
    `save_program` writes it, UnsupportedOperator when it names an operator outside the allow-list,
    LimitExceeded when a value inside would be larger than `MAX_VALUE_BYTES`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InvalidProgram(f"The bundle is not a readable safetensors file: {error}") from error
    try:
        document = json.loads(
            metadata[METADATA_KEY], parse_constant=_no_constant, object_pairs_hook=_once
        )
    except KeyError as error:
        raise InvalidProgram("The file holds weights but no program.") from error
    except RecursionError:
        raise NestingTooDeep("The bundle's program is nested too deeply.") from None
    except ValueError as error:
        raise InvalidProgram(f"The bundle's program is not JSON: {error}") from error
    program = _program_from_json(document, weights)
    _check_shapes(program)
    return program


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DuplicateKey("A key stands twice in the bundle's program.")
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


# Writing -----------------------------------------------------------------------------------------


def _program_to_json(program: Program) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "inputs": [_spec_to_json(spec) for spec in program.inputs],
        "nodes": [_node_to_json(node) for node in program.nodes],
        "outputs": list(program.outputs),
    }


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "args": {key: _argument_to_json(value) for key, value in node.args.items()},
        "shape": None if node.shape is None else list(node.shape),
        "dtype": node.dtype,
        "source": node.source,
    }


def _argument_to_json(argument: Argument) -> Any:
    if isinstance(argument, Ref):
        return {"ref": argument.name}
    if isinstance(argument, DType):
        return {"dtype": argument.name}
    if isinstance(argument, tuple):
        return [_argument_to_json(item) for item in argument]
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    return argument


# Reading -----------------------------------------------------------------------------------------


def _program_from_json(document: Any, weights: dict[str, Tensor]) -> Program:
    fields = _fields(document, {"format", "inputs", "nodes", "outputs"}, "The program")
    if fields["format"] != FORMAT:
        raise InvalidProgram(f"The bundle has format {fields['format']!r}; this reads {FORMAT}.")
    nodes = _list(fields["nodes"], "nodes")
    if len(nodes) > MAX_NODES:
        raise InvalidProgram(f"The program has {len(nodes)} nodes; at most {MAX_NODES} are read.")
    return Program(
        inputs=tuple(_spec_from_json(item) for item in _list(fields["inputs"], "inputs")),
        nodes=tuple(_node_from_json(item) for item in nodes),
        outputs=tuple(_name(item) for item in _list(fields["outputs"], "outputs")),
        weights=weights,
    )


def _spec_from_json(item: Any) -> TensorSpec:
    fields = _fields(item, {"name", "shape", "dtype"}, "An input")
    return TensorSpec(_name(fields["name"]), _shape(fields["shape"]), _dtype(fields["dtype"]))


def _node_from_json(item: Any) -> Node:
    fields = _fields(item, {"name", "op", "args", "shape", "dtype", "source"}, "A node")
    name, op, source = _name(fields["name"]), fields["op"], fields["source"]
    if not isinstance(op, str) or op not in OPERATORS:
        raise UnsupportedOperator(f"Node {name!r} calls {op!r}.", operator=str(op))
    if not isinstance(source, str) or len(source) > 1024:
        raise InvalidProgram(f"Node {name!r} has an invalid source.")
    if not isinstance(fields["args"], dict):
        raise InvalidProgram(f"The arguments of node {name!r} are not an object.")
    args = {key: _argument_from_json(value, name) for key, value in fields["args"].items()}
    _check_parameters(name, op, args)
    return Node(
        name=name,
        op=op,
        args=args,
        shape=None if fields["shape"] is None else _shape(fields["shape"]),
        dtype=None if fields["dtype"] is None else _dtype(fields["dtype"]),
        source=source,
    )


def _check_parameters(name: str, op: str, args: dict[str, Argument]) -> None:
    if op not in ATEN:
        if set(args) != {"a", "b"}:
            raise InvalidProgram(f"Node {name!r} must give {op} exactly a and b.")
        return
    parameters = {argument.name: argument for argument in ATEN[op]._schema.arguments}
    unknown = sorted(set(args) - set(parameters))
    if unknown:
        raise InvalidProgram(f"Node {name!r} gives {op} an unknown argument {unknown[0]!r}.")
    if list(args) != [key for key in parameters if key in args]:
        raise InvalidProgram(f"The arguments of node {name!r} are not in the operator's order.")
    for key, value in args.items():
        if isinstance(value, str) and "str" not in str(parameters[key].type):
            raise InvalidProgram(f"Argument {key!r} of node {name!r} cannot be text.")


def _argument_from_json(value: Any, node: str, depth: int = 0) -> Argument:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list) and depth < 3:
        return tuple(_argument_from_json(item, node, depth + 1) for item in value)
    if isinstance(value, dict) and len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "ref":
            return Ref(_name(content))
        if kind == "dtype":
            return DType(_dtype(content))
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
    raise InvalidProgram(f"Node {node!r} has an argument of an unknown kind.")


def _fields(item: Any, names: set[str], what: str) -> dict[str, Any]:
    if not isinstance(item, dict) or set(item) != names:
        raise InvalidProgram(f"{what} must have exactly the fields {sorted(names)}.")
    return item


def _list(item: Any, what: str) -> list[Any]:
    if not isinstance(item, list):
        raise InvalidProgram(f"The program's {what} are not a list.")
    return item


def _name(item: Any) -> str:
    if not isinstance(item, str) or not _NAME.fullmatch(item):
        raise InvalidProgram(f"{str(item)[:80]!r} is not a value name.")
    return item


def _shape(item: Any) -> tuple[int | None, ...]:
    if not isinstance(item, list) or not all(
        size is None or (type(size) is int and 0 <= size < 1 << 40) for size in item
    ):
        raise InvalidProgram("A shape must be a list of sizes, or null for the batch axis.")
    return tuple(item)


def _dtype(item: Any) -> str:
    if not isinstance(item, str) or item not in DTYPES:
        raise InvalidProgram(f"{str(item)[:40]!r} is not a dtype that programs use.")
    return str(item)


def _check_shapes(program: Program) -> None:
    """Run the graph on meta tensors and compare every recorded shape and dtype."""
    values: dict[str, Any] = {
        spec.name: torch.empty(spec.sized(_PROBE_BATCH), dtype=DTYPES[spec.dtype], device="meta")
        for spec in program.inputs
    }
    for name, tensor in program.weights.items():
        values[name] = tensor.to("meta")
    for node in program.nodes:
        try:
            result = evaluate(node.op, node.args, values)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise InvalidProgram(
                f"Node {node.name!r} ({node.op}) does not fit its arguments: {error}"
            ) from error
        if isinstance(result, Tensor):
            if (size := result.numel() * result.dtype.itemsize) > MAX_VALUE_BYTES:
                raise LimitExceeded(
                    f"Node {node.name!r} would take {size} bytes for {_PROBE_BATCH} samples; "
                    f"at most {MAX_VALUE_BYTES} are allowed.",
                    remedy="Use smaller inputs.",
                )
            recorded = None if node.shape is None else _sizes(node.shape, result.shape)
            if recorded != tuple(result.shape) or node.dtype != str(result.dtype)[6:]:
                raise InvalidProgram(
                    f"Node {node.name!r} records {node.shape} {node.dtype}, "
                    f"but {node.op} gives {tuple(result.shape)} {str(result.dtype)[6:]}."
                )
        values[node.name] = result


def _sizes(shape: tuple[int | None, ...], actual: torch.Size) -> tuple[int, ...] | None:
    """Recorded sizes with unknown ones taken from `actual`, or None when the ranks differ."""
    if len(shape) != len(actual):
        return None
    return tuple(real if size is None else size for size, real in zip(shape, actual, strict=True))
