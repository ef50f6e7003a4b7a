"""Sums and concatenations of branches that stay, and why: residuals, the modules of Inception."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from service.fusion.analysis import APART, Analysis
from service.fusion.cover import BORDER_REASON, Cover, dearer, usable
from service.fusion.rules import JOIN
from service.graph.program import Node


@dataclass(frozen=True)
class Join:
    """A sum or concatenation of `branches` values that no convolution could take in, and why.

    `module` is where it stands and `op` its ATen name.
    """

    module: str
    op: str
    branches: int
    reason: str


def kept_joins(analysis: Analysis, cover: Cover) -> tuple[Join, ...]:
    """Every join of branches that the fused program still computes, in execution order."""
    nodes = {node.name: node for node in analysis.program.nodes}
    position = {name: index for index, name in enumerate(nodes)}
    joins = []
    for name, form in cover.chosen.items():
        node = nodes[name]
        branches = [ref for ref in node.refs() if ref not in analysis.constants]
        if form is None and node.op in JOIN and len(branches) > 1 and name in analysis.linear:
            reason = _why(node, analysis, cover) or _starts(branches, analysis, nodes, position)
            joins.append(Join(node.source, node.op, len(branches), reason))
    return tuple(joins)


def _why(node: Node, analysis: Analysis, cover: Cover) -> str | None:
    """The reason why branches of one value stay apart; None where they start from several."""
    if node.name in cover.cheaper:
        return dearer(cover.cheaper[node.name])
    forms = analysis.forms.get(node.name, {}).values()
    if any(not usable(form) for form in forms):
        return BORDER_REASON
    inexact = [reason for reason in analysis.refusals.get(node.name, ()) if reason != APART]
    return inexact[0] if inexact else None


def _starts(
    branches: list[str],
    analysis: Analysis,
    nodes: Mapping[str, Node],
    position: Mapping[str, int],
) -> str:
    """Where each branch begins to be linear: behind which operator, and of which modules."""
    found: dict[str, list[str]] = defaultdict(list)
    for branch in branches:
        roots = [branch, *(root for root, _ in analysis.forms.get(branch, {}))]
        start = nodes.get(min(roots, key=lambda name: position.get(name, -1)))
        if start is None:
            found["the input"].append("")
        else:
            found[start.short].append(start.source)
    told = []
    for op, sources in found.items():
        names = ", ".join(dict.fromkeys(filter(None, sources)))
        told.append(f"{op} ({names})" if names else op)
    return f"{APART}: they are linear only from behind {' and '.join(told)}"
