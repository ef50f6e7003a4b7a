"""Putting a program together value by value: what every way into a program shares.

Here stand the canonical forms: batch norms have one output, splits are slices, views are reshapes,
arguments go by name with defaults filled in, and where a tensor lives is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from service.errors import InvalidProgram
from service.graph.operators import ATEN, FACTORIES, PLACEMENT
from service.graph.program import Argument, Node, Program, Ref, TensorSpec

Kind: TypeAlias = "tuple[tuple[int | None, ...], str] | None"
"""Shape and dtype name of a tensor; None for sizes and for several outputs."""


PASSING = frozenset({"aten.detach", "aten.alias", "aten.dropout"})
"""Calls that return their argument itself (dropout: in eval mode, which `check_eval` tells)."""


class Builder:
    """Collects inputs, weights and nodes, and names the nodes itself."""

    def __init__(self) -> None:
        self.inputs: list[TensorSpec] = []
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}

    def input(self, shape: tuple[int | None, ...], dtype: str) -> str:
        """Add the next input; returns its name."""
        name = f"input_{len(self.inputs)}"
        self.inputs.append(TensorSpec(name, shape, dtype))
        return name

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a weight under its own dotted name."""
        self.weights[name] = tensor.detach()
        return name

    def constant(self, tensor: Tensor) -> str:
        """Add a weight that the graph itself makes; returns its name."""
        return self.weight(self._free(f"constant_{len(self.nodes)}_{len(self.weights)}"), tensor)

    def emit(self, op: str, args: Mapping[str, Argument], kind: Kind, source: str = "") -> str:
        """Add a call of `op`; returns the name of its value."""
        short = op.removeprefix("aten.").partition(".")[0].strip("_")
        name = self._free(f"{short}_{len(self.nodes)}")
        shape, dtype = kind or (None, None)
        self.nodes.append(Node(name, op, dict(args), shape, dtype, source))
        return name

    def program(self, outputs: Sequence[str]) -> Program:
        """The finished program without what no output needs."""
        return Program(tuple(self.inputs), tuple(self.nodes), tuple(outputs), self.weights).pruned()

    def _free(self, name: str) -> str:
        while name in self.weights:
            name += "_"
        return name


def full_arguments(op: str, given: Mapping[str, Argument]) -> dict[str, Argument]:
    """`given` in the schema's order with its defaults filled in, without placement.

    Raises InvalidProgram for an argument that `op` does not have, or lacks.
    """
    parameters = ATEN[op]._schema.arguments
    unknown = set(given) - {parameter.name for parameter in parameters}
    if unknown:
        raise InvalidProgram(f"{op} has no argument {sorted(unknown)[0][:80]!r}.")
    args: dict[str, Argument] = {}
    for parameter in parameters:
        if parameter.name in PLACEMENT:
            continue
        if parameter.name in given:
            args[parameter.name] = given[parameter.name]
        elif parameter.has_default_value():
            args[parameter.name] = _stored(parameter.default_value)
        else:
            raise InvalidProgram(f"{op} is called without its argument {parameter.name!r}.")
    return args


def _stored(default: object) -> Argument:
    if isinstance(default, (list, tuple)):
        return tuple(_stored(item) for item in default)
    if default is None or isinstance(default, (bool, int, float, str)):
        return default
    raise InvalidProgram(f"A default of type {type(default).__name__} cannot be stored.")


def batch_norm_arguments(given: Mapping[str, Argument]) -> dict[str, Argument]:
    """Arguments of `aten.batch_norm` with stored statistics, from any spelling of that call."""
    names = ("input", "weight", "bias", "running_mean", "running_var")
    return {
        **{name: given[name] for name in names},
        "training": False,
        "momentum": given["momentum"],
        "eps": given["eps"],
        "cudnn_enabled": False,
    }


def slice_arguments(whole: str, dim: int, start: int, end: int) -> dict[str, Argument]:
    """Arguments of `aten.slice.Tensor` for `whole[start:end]` along `dim`."""
    return {"self": Ref(whole), "dim": dim, "start": start, "end": end, "step": 1}


def check_eval(op: str, args: Mapping[str, Argument]) -> None:
    """Raises InvalidProgram for a call that behaves as in training."""
    training = {
        "aten.batch_norm": args.get("training") is not False or args.get("running_mean") is None,
        "aten.dropout": args.get("train") is not False,
        "aten.scaled_dot_product_attention": args.get("dropout_p") != 0,
        "aten.instance_norm": args.get("running_mean") is not None
        and args.get("use_input_stats") is not False,
    }
    if training.get(op, False):
        raise InvalidProgram(
            f"{op} is called as in training.", remedy="Call module.eval() before exporting it."
        )


def is_constant(op: str, args: Mapping[str, Argument]) -> bool:
    """Whether a factory's result depends on nothing, so that it can be stored as a weight."""
    return op in FACTORIES and not any(_has_ref(argument) for argument in args.values())


def _has_ref(argument: Argument) -> bool:
    if isinstance(argument, tuple):
        return any(_has_ref(item) for item in argument)
    return isinstance(argument, Ref)
