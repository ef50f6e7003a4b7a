"""The fusion report: every block of the network as fused, kept or refused, with its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.fusion.analysis import Analysis
from service.fusion.cost import convolution_count, node_macs, program_macs
from service.fusion.cover import BORDER_REASON, Cover, dearer, usable
from service.fusion.joins import Join, kept_joins
from service.fusion.jsonable import jsonable
from service.fusion.rewrite import Region
from service.fusion.rules import CONVOLUTIONS
from service.fusion.siblings import Apart, Merge, Merged
from service.fusion.sources import Rule
from service.fusion.text import report_text
from service.graph.program import Node, Program, TensorSpec


@dataclass(frozen=True)
class Operation:
    """One operator of a block before fusion, as a step of its drawing.

    `op` is the ATen name; `kernel` and `groups` are those of a convolution, else empty and 1.
    `reads` are positions among the block's operations; -1 stands for what enters the block.
    """

    op: str
    module: str
    kernel: tuple[int, ...]
    groups: int
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One linear region. `status` is `fused`, `kept` (nothing to gain) or `refused` (not exact).

    `modules` are the source modules, `operations` what it was made of in execution order, `rules`
    and `sources` how they were joined and where each rule is published; counts are of one sample.
    """

    module: str
    status: str
    reason: str
    rules: tuple[str, ...]
    sources: tuple[str, ...]
    modules: tuple[str, ...]
    operations: tuple[Operation, ...]
    operators_before: int
    operators_after: int
    convolutions_before: int
    convolutions_after: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    in_channels: int
    out_channels: int
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    error_float64: float | None = None


@dataclass(frozen=True)
class Totals:
    """The whole program before and after; MACs of one sample, bytes of all weights."""

    blocks: int
    fused: int
    kept: int
    refused: int
    convolutions_before: int
    convolutions_after: int
    operators_before: int
    operators_after: int
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Report:
    """Every block, the siblings that were merged or stay apart, and the joins that stay."""

    blocks: tuple[Block, ...]
    merges: tuple[Merge, ...]
    apart: tuple[Apart, ...]
    joins: tuple[Join, ...]
    totals: Totals

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, a key for each field; all but `totals` are lists."""
        return {
            "totals": jsonable(self.totals),
            "blocks": [jsonable(block) for block in self.blocks],
            "merges": [jsonable(merge) for merge in self.merges],
            "apart": [jsonable(group) for group in self.apart],
            "joins": [jsonable(join) for join in self.joins],
        }

    def to_text(self) -> str:
        """The same for people, without what only a certificate or probes tell."""
        return report_text(self.to_dict())


def make_report(
    analysis: Analysis, cover: Cover, fused: Sequence[Region], merged: Merged
) -> Report:
    """Describe what was done with `cover`, ending in the program of `merged`."""
    nodes = {node.name: node for node in analysis.program.nodes}
    readers = analysis.program.readers()
    regions = {region.output: region for region in fused}
    blocks = []
    for name, form in cover.chosen.items():
        if form is not None and name in regions:
            block = _fused_block(regions[name], analysis, nodes)
            if block.convolutions_before or block.operators_before > 1:
                blocks.append(block)
        elif form is None and nodes[name].op in CONVOLUTIONS:
            blocks.append(_kept_block(nodes[name], analysis, cover, nodes, readers))
    totals = _totals(blocks, analysis.program, merged.program)
    joins = kept_joins(analysis, cover)
    return Report(tuple(blocks), merged.merges, merged.apart, joins, totals)


def _fused_block(region: Region, analysis: Analysis, nodes: dict[str, Node]) -> Block:
    form, geometry = region.form, region.form.geometry
    members = [node for node in analysis.program.nodes if node.name in form.nodes]
    rules = sorted(form.rules | _parameter_rule(members, analysis), key=lambda r: r.value)
    convolutional = not (geometry.pointwise and geometry.depthwise) and bool(geometry.kernel)
    return Block(
        module=region.module,
        status="fused",
        reason="",
        rules=tuple(rule.value for rule in rules),
        sources=tuple(rule.source for rule in rules),
        modules=_modules(members),
        operations=_operations(members, analysis),
        operators_before=len(members),
        operators_after=1,
        convolutions_before=sum(node.op in CONVOLUTIONS for node in members),
        convolutions_after=int(convolutional),
        kernel=geometry.kernel,
        stride=geometry.stride,
        groups=geometry.groups,
        in_channels=geometry.in_channels,
        out_channels=geometry.out_channels,
        macs_before=sum(node_macs(node, analysis.specs) for node in members),
        macs_after=geometry.macs,
        parameters_before=_parameters(members, analysis, nodes),
        parameters_after=_product(geometry.weight_shape) + geometry.out_channels,
    )


def _parameter_rule(members: Sequence[Node], analysis: Analysis) -> frozenset[Rule]:
    computed = analysis.constants.computed
    generated = any(name in computed for node in members for name in node.refs())
    return frozenset({Rule.PARAMETERS}) if generated else frozenset()


def _modules(members: Sequence[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(node.source for node in members if node.source))


def _operations(members: Sequence[Node], analysis: Analysis) -> tuple[Operation, ...]:
    position = {node.name: index for index, node in enumerate(members)}
    constants = analysis.program.weights.keys() | analysis.constants.computed
    return tuple(
        Operation(
            op=node.op,
            module=node.source,
            kernel=_kernel(node, analysis.specs) if node.op in CONVOLUTIONS else (),
            groups=_groups(node),
            reads=tuple(position.get(name, -1) for name in node.refs() if name not in constants),
        )
        for node in members
    )


def _kernel(node: Node, specs: dict[str, TensorSpec]) -> tuple[int, ...]:
    weight = _weight_spec(node, specs)
    return tuple(size or 0 for size in weight.shape[2:]) if weight else ()


def _groups(node: Node) -> int:
    groups = node.args.get("groups")
    return groups if isinstance(groups, int) else 1


def _parameters(members: Sequence[Node], analysis: Analysis, nodes: dict[str, Node]) -> int:
    """Elements of the floating-point weights that the nodes read, directly or through folding."""
    weights = analysis.program.weights
    pending = [name for node in members for name in node.refs()]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in analysis.constants.computed:
            pending.extend(nodes[name].refs())
    return sum(weights[n].numel() for n in seen if n in weights and weights[n].is_floating_point())


def _product(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _kept_block(
    node: Node,
    analysis: Analysis,
    cover: Cover,
    nodes: dict[str, Node],
    readers: dict[str, list[str]],
) -> Block:
    following = [nodes[name] for name in readers.get(node.name, ()) if name]
    status, reason = _why_kept(node, following, analysis, cover, nodes)
    specs = analysis.specs
    weight = _weight_spec(node, specs)
    shape = tuple(n or 0 for n in weight.shape) if weight else ()
    groups = _groups(node)
    return Block(
        module=node.source,
        status=status,
        reason=reason,
        rules=(),
        sources=(),
        modules=_modules([node]),
        operations=_operations([node], analysis),
        operators_before=1,
        operators_after=1,
        convolutions_before=1,
        convolutions_after=1,
        kernel=_kernel(node, specs),
        stride=_numbers(node.args.get("stride")),
        groups=groups,
        in_channels=(shape[1] if len(shape) > 1 else 0) * groups,
        out_channels=shape[0] if shape else 0,
        macs_before=node_macs(node, specs),
        macs_after=node_macs(node, specs),
        parameters_before=_parameters([node], analysis, nodes),
        parameters_after=_parameters([node], analysis, nodes),
    )


def _weight_spec(node: Node, specs: dict[str, TensorSpec]) -> TensorSpec | None:
    names = list(node.refs())
    return specs.get(names[1]) if len(names) > 1 else None


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(n for n in value if isinstance(n, int)) if isinstance(value, tuple) else ()


def _why_kept(
    node: Node,
    readers: Sequence[Node],
    analysis: Analysis,
    cover: Cover,
    nodes: dict[str, Node],
) -> tuple[str, str]:
    """The status and the sentence for a convolution that stays as it is."""
    if "transpose" in node.op:
        return "refused", "no rule takes a transposed convolution"
    if node.name not in analysis.linear:
        return "refused", "its kernel depends on the input"
    if node.name in cover.cheaper:
        return "kept", dearer(cover.cheaper[node.name])
    if node.name in analysis.refusals:
        return "refused", "; ".join(analysis.refusals[node.name])
    if _bordered(node.name, node.name, analysis):
        return "refused", BORDER_REASON
    for reader in readers:
        reason = _why_apart(node, reader, analysis, cover, nodes)
        if reason is not None:
            return "kept", f"{reader.short} after it: {reason}"
    for name in node.refs():
        if name in analysis.refusals and not analysis.forms.get(name):
            return "kept", f"{nodes[name].short} before it: {analysis.refusals[name][0]}"
    after = ", ".join(dict.fromkeys(node.short for node in readers)) or "the output"
    return "kept", f"a single convolution; {after} follows"


def _why_apart(
    node: Node, reader: Node, analysis: Analysis, cover: Cover, nodes: dict[str, Node]
) -> str | None:
    """Why the operator that reads `node` is not fused with it; None where it is not linear."""
    if reader.name not in analysis.linear:
        return None
    if _bordered(node.name, reader.name, analysis):
        return BORDER_REASON
    if cover.chosen.get(reader.name) is not None:
        return None
    for name in reader.refs():
        # A branch that is no convolution says more than that the branches have no common start.
        if name != node.name and name in analysis.refusals and not analysis.forms[name]:
            return f"{nodes[name].short} beside it: {analysis.refusals[name][0]}"
    if reader.name in analysis.refusals:
        return analysis.refusals[reader.name][0]
    return dearer(cover.cheaper[reader.name]) if reader.name in cover.cheaper else None


def _bordered(member: str, value: str, analysis: Analysis) -> bool:
    """Whether `value` has a form through `member` that only its border keeps from being one."""
    forms = analysis.forms.get(value, {}).values()
    return any(member in form.nodes and not usable(form) for form in forms)


def _totals(blocks: Sequence[Block], before: Program, after: Program) -> Totals:
    count = {
        status: sum(b.status == status for b in blocks) for status in ("fused", "kept", "refused")
    }
    return Totals(
        blocks=len(blocks),
        fused=count["fused"],
        kept=count["kept"],
        refused=count["refused"],
        convolutions_before=convolution_count(before),
        convolutions_after=convolution_count(after),
        operators_before=len(before.nodes),
        operators_after=len(after.nodes),
        macs_before=program_macs(before),
        macs_after=program_macs(after),
        parameters_before=before.parameter_count,
        parameters_after=after.parameter_count,
        bytes_before=before.weight_bytes,
        bytes_after=after.weight_bytes,
    )
