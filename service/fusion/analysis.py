"""Abstract interpretation of a program: every value's affine forms, and why others have none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from service.errors import FusionError, out_of_memory
from service.fusion import affine
from service.fusion.constants import Constants
from service.fusion.form import Form, Inexact, Layout
from service.fusion.rules import JOIN, UNARY, Call, layout_of
from service.graph.program import Program, TensorSpec

MAX_ROOTS = 8
"""Forms kept for one value, nearest roots first. A chain of linear layers longer than this is fused
piece by piece instead of being tried from every start."""

Key = tuple[str, Layout]

APART = "the branches do not all start from one value"
"""Why a join has no form of its own."""


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found, by value name.

    `forms[v]` are v's forms by root and layout; `linear` are the nodes that are linear in what they
    read; `refusals[v]` says why a linear node has no form of a root that an operand has.
    """

    program: Program
    constants: Constants
    specs: dict[str, TensorSpec]
    forms: dict[str, dict[Key, Form]]
    linear: frozenset[str]
    refusals: dict[str, list[str]] = field(default_factory=dict)


def analyse(program: Program) -> Analysis:
    """Interpret every node of `program` once, in order."""
    constants, specs = Constants(program), program.specs()
    order = {spec.name: -1 for spec in program.inputs}
    readers = program.readers()
    forms: dict[str, dict[Key, Form]] = {}
    refusals: dict[str, list[str]] = {}
    linear = set()
    for position, node in enumerate(program.nodes):
        order[node.name] = position
        if node.name in constants or node.shape is None:
            continue
        try:
            interpreted = _interpret(Call(node, constants, specs), forms)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise FusionError(f"{node.op} at {node.source or node.name}: {error}") from error
        if interpreted is None:
            continue
        found, reasons = interpreted
        linear.add(node.name)
        nearest = sorted(found, key=lambda form: order[form.root], reverse=True)[:MAX_ROOTS]
        shared = len(readers.get(node.name, ())) > 1
        forms[node.name] = {
            (form.root, form.layout): form.with_node(node.name, shared=shared) for form in nearest
        }
        if reasons:
            refusals[node.name] = list(dict.fromkeys(reasons))
    return Analysis(program, constants, specs, forms, frozenset(linear), refusals)


def _interpret(
    call: Call, forms: dict[str, dict[Key, Form]]
) -> tuple[list[Form], list[str]] | None:
    """Forms of one node's result with the reasons for those it lacks; None: not linear."""
    data = call.data()
    op = call.node.op
    if any(not _is_floating(call.specs.get(name)) for name in data):
        return None
    if len(data) == 1 and op in UNARY:
        return _unary(call, _bases(data[0], call, forms))
    if len(data) > 1 and op in JOIN and all(name in call.specs for name in data):
        return _joined(call, data, forms)
    return None


def _is_floating(spec: TensorSpec | None) -> bool:
    """Sizes are allowed among the operands; tensors must be real numbers."""
    return spec is None or spec.dtype.startswith(("float", "bfloat"))


def _unary(call: Call, bases: Iterator[Form]) -> tuple[list[Form], list[str]]:
    found, failed = [], []
    for base in bases:
        try:
            found.append(UNARY[call.node.op](call, base))
        except Inexact as reason:
            failed.append((base, str(reason)))
    # The operand as a form of itself has one layout in which the operator fits; the other says
    # nothing about the network.
    return found, [reason for base, reason in failed if not (found and base.trivial)]


def _joined(
    call: Call, data: list[str], forms: dict[str, dict[Key, Form]]
) -> tuple[list[Form], list[str]]:
    keys = dict.fromkeys(key for name in data for key in forms.get(name, {}))
    found, reasons = [], []
    for key in keys:
        operands = [_form_of(name, key, call, forms) for name in data]
        if any(operand is None for operand in operands):
            reasons.append(APART)
            continue
        try:
            found.append(JOIN[call.node.op](call, [f for f in operands if f is not None]))
        except Inexact as reason:
            reasons.append(str(reason))
    return found, reasons


def _bases(name: str, call: Call, forms: dict[str, dict[Key, Form]]) -> Iterator[Form]:
    """The operand as a form of itself, and as whatever forms it already has."""
    wanted = layout_of(call)
    shape = call.specs[name].shape
    for layout in Layout:
        if wanted in {None, layout} and (layout is Layout.LAST or len(shape) > 2):
            itself = _itself(name, layout, shape)
            if itself is not None:
                yield itself
    for form in forms.get(name, {}).values():
        if wanted in {None, form.layout}:
            yield form


def _form_of(name: str, key: Key, call: Call, forms: dict[str, dict[Key, Form]]) -> Form | None:
    root, layout = key
    if name == root:
        return _itself(name, layout, call.specs[name].shape)
    return forms.get(name, {}).get(key)


def _itself(name: str, layout: Layout, shape: tuple[int | None, ...]) -> Form | None:
    if len(shape) < 2:
        return None
    channels = shape[1] if layout is Layout.FIRST else shape[-1]
    size = shape[2:] if layout is Layout.FIRST else ()
    known = tuple(n for n in size if n is not None)
    if channels is None or len(known) != len(size):
        return None
    return affine.identity(name, layout, channels, known)
