"""Choosing which forms to use: the cheapest way to compute every value that must exist.

Values read by non-linear operators, and outputs, must exist. Each linear value can be computed by
its own operator from its operands, or by one fused operator from the root of any of its forms. The
choice is a covering problem as in technology mapping. A value that several operators read has its
cost shared among them; the result is compared with a cover that never looks through such values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from service.fusion.analysis import Analysis
from service.fusion.cost import elements, form_cost, node_cost, pad_cost
from service.fusion.form import Form, Geometry, Layout

BORDER_REASON = "the bias would differ between border and interior"


@dataclass(frozen=True)
class Cover:
    """`chosen[v]` is the form that computes v, None where v's own operator stays.

    Only values that the fused program computes are listed. `cheaper[v]` are the costs (kept, best
    form) where a form existed and lost.
    """

    chosen: dict[str, Form | None]
    cost: float
    cheaper: dict[str, tuple[float, float]]


def emitted_geometry(form: Form) -> Geometry:
    """The geometry that is run: a linear layer has no groups unless it only scales."""
    geometry = form.geometry
    if form.layout is Layout.LAST and not geometry.depthwise:
        return replace(geometry, groups=1)
    return geometry


def rows_of(form: Form, analysis: Analysis) -> int:
    """Positions of the root that the geometry does not count: tokens of a channels-last value."""
    shape = analysis.specs[form.root].shape
    return elements(shape[:-1]) if form.layout is Layout.LAST else 1


def cost_of(form: Form, analysis: Analysis) -> float:
    """Cost of computing the form by one operator from its root."""
    if form.trivial:
        return 0.0
    geometry, rows = emitted_geometry(form), rows_of(form, analysis)
    if (
        form.layout is Layout.LAST
        and geometry.depthwise
        and len(analysis.specs[form.root].shape) > 2
    ):
        return 2 * form_cost(geometry, rows)  # a product and a sum: no batch norm does it there
    if geometry.padding is not None:
        return form_cost(geometry, rows)
    size = tuple(n + sum(pair) for n, pair in zip(geometry.in_size, geometry.pads, strict=True))
    return pad_cost(geometry) + form_cost(replace(geometry, in_size=size), rows)


def usable(form: Form) -> bool:
    """Whether one operator can compute the form: its bias must be the same everywhere."""
    return form.bias.is_constant()


def dearer(costs: tuple[float, float]) -> str:
    """The reason for what stays because the costs (kept, fused) say so."""
    return f"fusing it would raise its cost from {costs[0]:,.0f} to {costs[1]:,.0f}"


def cover(analysis: Analysis) -> Cover:
    """The cheaper of two covers: looking through shared values, and not."""
    return min(
        (_Covering(analysis, through_shared).result() for through_shared in (True, False)),
        key=lambda result: result.cost,
    )


class _Covering:
    """One bottom-up pass of costs and one top-down pass of choices."""

    def __init__(self, analysis: Analysis, through_shared: bool) -> None:
        self.analysis = analysis
        self.readers = analysis.program.readers()
        self.nodes = {node.name: node for node in analysis.program.nodes}
        self.fixed = set(self._fixed(through_shared))
        self.best: dict[str, float] = {}
        self.choice: dict[str, Form | None] = {}
        self.lost: dict[str, tuple[float, float]] = {}
        for node in analysis.program.nodes:
            if node.name in analysis.linear:
                self._settle(node.name)

    def _fixed(self, through_shared: bool) -> Iterator[str]:
        """Values that must exist whatever is chosen."""
        analysis = self.analysis
        for name in analysis.linear:
            readers = self.readers.get(name, [])
            opaque = any(
                not reader or (reader not in analysis.linear) or not analysis.forms.get(reader)
                for reader in readers
            )
            if opaque or (len(readers) > 1 and not through_shared):
                yield name

    def _flow(self, name: str) -> float:
        """The share of a value's cost that one of its readers bears."""
        if name in self.fixed or name not in self.best:
            return 0.0
        return self.best[name] / max(1, len(self.readers.get(name, [])))

    def _settle(self, name: str) -> None:
        node, analysis = self.nodes[name], self.analysis
        data = [n for n in dict.fromkeys(node.refs()) if n not in analysis.constants]
        kept = node_cost(node, analysis.specs) + sum(self._flow(n) for n in data)
        options = [
            (cost_of(form, analysis) + self._flow(form.root), len(form.nodes), form)
            for form in analysis.forms.get(name, {}).values()
            if (len(form.nodes) > 1 or form.trivial) and usable(form)
        ]
        best = min(options, key=lambda option: option[:2], default=None)
        # Whatever removes an operator costs strictly less, so at equal cost nothing is gained: this
        # keeps a batch norm with the convolution before it, not the one after.
        if best is None or (best[0] >= kept and not best[2].trivial):
            self.best[name], self.choice[name] = kept, None
            dearer = [option[0] for option in options if option[0] > kept]
            if dearer:
                self.lost[name] = (kept, min(dearer))
        else:
            self.best[name], self.choice[name] = best[0], best[2]

    def result(self) -> Cover:
        chosen: dict[str, Form | None] = {}
        total = 0.0
        pending = set(self.analysis.program.outputs)
        for node in reversed(self.analysis.program.nodes):
            name = node.name
            if name not in pending or self.analysis.constants.settled(name):
                continue
            form = self.choice.get(name)
            chosen[name] = form
            if form is None:
                pending.update(node.refs())
                total += node_cost(node, self.analysis.specs)
            else:
                pending.add(form.root)
                total += cost_of(form, self.analysis)
        lost = {name: costs for name, costs in self.lost.items() if name in chosen}
        return Cover(dict(reversed(chosen.items())), total, lost)
