"""Sibling convolutions that read one value with one geometry become a single wider convolution.

Inception's modules begin with several 1x1 convolutions of the same input (Szegedy et al. 2015, §4);
merged, the input is read once. It is exact, saves no arithmetic, and costs a copy wherever a part
of the result feeds something that wants it contiguous, so it is done only where that is less than
the reading saved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.fusion.cost import MACS_PER_ELEMENT, elements
from service.graph.program import Argument, Node, Program, Ref, TensorSpec

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
class Apart:
    """Convolutions that read one value and stay apart, and the reason."""

    source: str
    modules: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Merged:
    """The program with its merges made, or as it was given, and what stayed `apart`."""

    program: Program
    merges: tuple[Merge, ...]
    apart: tuple[Apart, ...] = ()


def merge_siblings(program: Program) -> Merged:
    """Merge every group of sibling convolutions where it pays; the input is not changed."""
    nodes = {node.name: node for node in program.nodes}
    readers, specs = program.readers(), program.specs()
    plans: list[_Plan] = []
    apart: list[Apart] = []
    for source, siblings in _siblings(program).items():
        groups: dict[tuple[object, ...], list[Node]] = defaultdict(list)
        for node in siblings:
            groups[_geometry(node, program)].append(node)
        for group in groups.values():
            if len(group) > 1:
                plan = _plan(group, nodes, readers, specs)
                if isinstance(plan, Apart):
                    apart.append(plan)
                else:
                    plans.append(plan)
        if len(groups) > 1:
            alone = [group[0] for group in groups.values() if len(group) == 1]
            apart += _alone(source, alone, siblings, program)
    if not plans:
        return Merged(program, (), tuple(apart))
    merges = tuple(plan.merge for plan in plans)
    return Merged(_apply(program, plans, nodes), merges, tuple(apart))


@dataclass(frozen=True)
class _Plan:
    merge: Merge
    members: tuple[Node, ...]
    activation: Node | None


def _siblings(program: Program) -> dict[str, list[Node]]:
    """Convolutions with stored kernels by the value they read, where that has several of them."""
    found: dict[str, list[Node]] = defaultdict(list)
    for node in program.nodes:
        weight, source = node.args.get("weight"), node.args.get("input")
        if not node.op.startswith("aten.conv") or "transpose" in node.op:
            continue
        if isinstance(weight, Ref) and weight.name in program.weights and isinstance(source, Ref):
            found[source.name].append(node)
    return {source: nodes for source, nodes in found.items() if len(nodes) > 1}


def _kernel(node: Node, program: Program) -> tuple[int, ...]:
    return tuple(program.weights[_name(node.args["weight"])].shape[2:])


def _geometry(node: Node, program: Program) -> tuple[object, ...]:
    """What convolutions must have in common to become one; a grouped one has it alone."""
    if node.args["groups"] != 1:
        return (node.name,)
    movement = (node.args[key] for key in ("stride", "padding", "dilation"))
    return (node.op, _kernel(node, program), *movement)


def _alone(
    source: str, alone: Sequence[Node], siblings: Sequence[Node], program: Program
) -> list[Apart]:
    """The siblings that no other has the geometry of, with what tells them apart."""
    if not alone:
        return []
    grouped = [node for node in alone if node.args["groups"] != 1]
    shapes = sorted({"x".join(map(str, _kernel(node, program))) for node in siblings})
    reason = (
        "a grouped convolution sees only a part of the channels"
        if len(grouped) == len(alone)
        else f"their kernels differ ({', '.join(shapes)})"
        if len(shapes) > 1
        else "their stride, padding or dilation differ"
    )
    return [Apart(source, tuple(node.source for node in alone), reason)]


def _plan(
    group: Sequence[Node],
    nodes: Mapping[str, Node],
    readers: Mapping[str, list[str]],
    specs: Mapping[str, TensorSpec],
) -> _Plan | Apart:
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
    read = (len(group) - 1) * elements(specs[source.name].shape)
    modules = tuple(node.source for node in group)
    if 2 * copies >= read:
        reason = (
            f"reading the input once would save {read:,} elements of traffic, "
            f"copying the parts out of the merged result would cost {2 * copies:,}"
        )
        return Apart(source.name, modules, reason)
    saved = MACS_PER_ELEMENT * float(read - 2 * copies)
    merge = Merge(
        source=source.name,
        convolutions=tuple(node.name for node in group),
        modules=modules,
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
