"""Sibling convolutions that read one value with one geometry become a single wider convolution.

Inception's modules begin with several 1x1 convolutions of the same input (Szegedy et al. 2015, §4);
merged, the input is read once. It is exact, saves no arithmetic, and costs a copy wherever a part
of the result feeds something that wants it contiguous, so it is done only where that is less than
the reading saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.fusion.cost import MACS_PER_ELEMENT, elements
from service.graph.program import Argument, Node, Program, Ref

ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in ("relu", "relu6", "silu", "gelu", "hardswish", "hardtanh", "sigmoid", "leaky_relu")
)
"""Activations that may run once on the merged value instead of once a part."""


@dataclass(frozen=True)
class Merge:
    """One merged convolution: the value it reads, the convolutions it replaced, what they give.

    `outputs` are values of the program before and after: the parts, behind a shared activation
    where there is one.
    """

    source: str
    convolutions: tuple[str, ...]
    modules: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: float


@dataclass(frozen=True)
class Merged:
    program: Program
    merges: tuple[Merge, ...]


def merge_siblings(program: Program) -> Merged:
    """Merge every group of sibling convolutions where it pays; the input is not changed."""
    nodes = {node.name: node for node in program.nodes}
    readers = program.readers()
    plans = [
        plan
        for group in _groups(program)
        if (plan := _plan(group, nodes, readers, program)) is not None
    ]
    if not plans:
        return Merged(program, ())
    return Merged(_apply(program, plans, nodes), tuple(plan.merge for plan in plans))


@dataclass(frozen=True)
class _Plan:
    merge: Merge
    members: tuple[Node, ...]
    activation: Node | None


def _groups(program: Program) -> Iterable[list[Node]]:
    """Convolutions by what they read and how, in program order."""
    groups: dict[tuple[object, ...], list[Node]] = defaultdict(list)
    for node in program.nodes:
        weight = node.args.get("weight")
        if not node.op.startswith("aten.conv") or "transpose" in node.op:
            continue
        if not isinstance(weight, Ref) or weight.name not in program.weights:
            continue
        kernel = tuple(program.weights[weight.name].shape[2:])
        key = (node.op, kernel, *(node.args[k] for k in ("input", "stride", "padding", "dilation")))
        if node.args["groups"] == 1:
            groups[key].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _plan(
    group: Sequence[Node],
    nodes: Mapping[str, Node],
    readers: Mapping[str, list[str]],
    program: Program,
) -> _Plan | None:
    specs = program.specs()
    source = group[0].args["input"]
    assert isinstance(source, Ref)
    activations = [_activation(node, nodes, readers) for node in group]
    shared = activations[0]
    if shared is None or any(
        other is None or _signature(other) != _signature(shared) for other in activations
    ):
        shared = None
    parts = [a for a in activations if a is not None] if shared else list(group)
    copies = sum(
        elements(part.shape)
        for part in parts
        if any(_wants_contiguous(nodes.get(name)) for name in readers.get(part.name, []))
    )
    saved = MACS_PER_ELEMENT * float(
        (len(group) - 1) * elements(specs[source.name].shape) - 2 * copies
    )
    if saved <= 0:
        return None
    merge = Merge(
        source=source.name,
        convolutions=tuple(node.name for node in group),
        modules=tuple(node.source for node in group),
        outputs=tuple(part.name for part in parts),
        saved=saved,
    )
    return _Plan(merge, tuple(group), shared)


def _activation(
    node: Node, nodes: Mapping[str, Node], readers: Mapping[str, list[str]]
) -> Node | None:
    """The one elementwise operator that reads the convolution, if there is no other reader."""
    names = readers.get(node.name, [])
    reader = nodes.get(names[0]) if len(names) == 1 else None
    return reader if reader is not None and reader.op in ELEMENTWISE else None


def _signature(node: Node) -> tuple[object, ...]:
    """The operator and its arguments but for the first, its operand."""
    return (node.op, *list(node.args.values())[1:])


def _wants_contiguous(reader: Node | None) -> bool:
    """Whether a reader would copy a channel slice; a concatenation copies in any case."""
    return reader is None or reader.op != "aten.cat"


def _apply(program: Program, plans: Sequence[_Plan], nodes: Mapping[str, Node]) -> Program:
    first = {plan.members[0].name: plan for plan in plans}
    gone = {name for plan in plans for name in (*plan.merge.convolutions, *plan.merge.outputs)}
    weights = dict(program.weights)
    result: list[Node] = []
    for node in program.nodes:
        if node.name in first:
            result.extend(_merged_nodes(first[node.name], nodes, weights))
        if node.name not in gone:
            result.append(node)
    return Program(program.inputs, tuple(result), program.outputs, weights).pruned()


def _merged_nodes(plan: _Plan, nodes: Mapping[str, Node], weights: dict[str, Tensor]) -> list[Node]:
    members = plan.members
    label = f"{members[0].name}_merged"
    kernels = [weights[_name(node.args["weight"])] for node in members]
    weights[f"{label}.weight"] = torch.cat(kernels)
    weights[f"{label}.bias"] = torch.cat(
        [_bias(node, kernel, weights) for node, kernel in zip(members, kernels, strict=True)]
    )
    channels = [kernel.shape[0] for kernel in kernels]
    shape = members[0].shape or ()
    wide = (shape[0], sum(channels), *shape[2:])
    args = {
        **members[0].args,
        "weight": Ref(f"{label}.weight"),
        "bias": Ref(f"{label}.bias"),
    }
    merged = [replace(members[0], name=label, args=args, shape=wide)]
    if plan.activation is not None:
        keys = list(plan.activation.args)
        activated = {**plan.activation.args, keys[0]: Ref(label)}
        merged.append(
            replace(plan.activation, name=f"{label}_activated", args=activated, shape=wide)
        )
    start = 0
    for output, count in zip(plan.merge.outputs, channels, strict=True):
        part: dict[str, Argument] = {
            "self": Ref(merged[0 if plan.activation is None else 1].name),
            "dim": 1,
            "start": start,
            "end": start + count,
            "step": 1,
        }
        original = nodes[output]
        merged.append(replace(original, op="aten.slice.Tensor", args=part))
        start += count
    return merged


def _name(argument: Argument) -> str:
    assert isinstance(argument, Ref)
    return argument.name


def _bias(node: Node, kernel: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    bias = node.args["bias"]
    return weights[bias.name] if isinstance(bias, Ref) else kernel.new_zeros(kernel.shape[0])
