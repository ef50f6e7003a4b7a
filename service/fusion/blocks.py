"""Kernels block by block, for deploy checkpoints under a project's own keys.

The served program may fuse across what a project calls a block, or leave alone what it merges. A
deploy checkpoint needs exactly one kernel a block. Both come from the same analysis: a block's
kernel is the form of its last linear value relative to the value that enters the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from service.errors import FusionError
from service.fusion.analysis import Analysis
from service.fusion.cover import emitted_geometry, usable
from service.fusion.form import Form
from service.fusion.kernels import regrouped


@dataclass(frozen=True)
class BlockLayer:
    """One block's layer in the deploy form.

    `deploy` is the layer's dotted path; `kept` are paths inside the block that stay behind it;
    `absorbed` paths outside the block, of modules or parameters, that the layer takes over.
    """

    deploy: str
    kept: tuple[str, ...] = ()
    absorbed: tuple[str, ...] = ()


def block_tensors(analysis: Analysis, blocks: Mapping[str, BlockLayer]) -> dict[str, Tensor]:
    """`{deploy path}.weight` and `.bias` (float32) of every block, keyed by the block's path.

    Raises FusionError for a block without a linear value that a single layer computes.
    """
    tensors = {}
    for block, layer in blocks.items():
        form = block_form(analysis, block, layer)
        kernel = regrouped(form.weight(), form.geometry.groups, emitted_geometry(form).groups)
        prefix = f"{layer.deploy}." if layer.deploy else ""
        tensors[f"{prefix}weight"] = kernel.float().contiguous()
        tensors[f"{prefix}bias"] = form.bias.interior.float().contiguous()
    return tensors


def block_form(analysis: Analysis, block: str, layer: BlockLayer) -> Form:
    """The form of a block's last linear value relative to the value that enters the block."""
    own, adopted = _own(analysis, block, layer), _adopted(analysis, layer)
    members = own | adopted
    best: Form | None = None
    for node in analysis.program.nodes:
        if node.name not in members:
            continue
        for form in analysis.forms.get(node.name, {}).values():
            inside = form.nodes <= members and form.nodes & own and form.root not in members
            if inside and usable(form):
                best = form
    if best is None:
        raise FusionError(f"The block {block!r} has no linear value that one layer computes.")
    return best


def _own(analysis: Analysis, block: str, layer: BlockLayer) -> set[str]:
    """The block's nodes, without those of the children that stay behind the layer."""
    return {
        node.name
        for node in analysis.program.nodes
        if node.name not in analysis.constants.computed
        and _within(node.source, block)
        and not _within_any(node.source, layer.kept)
    }


def _adopted(analysis: Analysis, layer: BlockLayer) -> set[str]:
    """Nodes of absorbed modules, and nodes that use absorbed parameters."""
    absorbed = _absorbed_constants(analysis, layer.absorbed)
    return {
        node.name
        for node in analysis.program.nodes
        if node.name not in analysis.constants.computed
        and (
            _within_any(node.source, layer.absorbed)
            or any(name in absorbed for name in node.refs())
        )
    }


def _absorbed_constants(analysis: Analysis, paths: tuple[str, ...]) -> set[str]:
    """Absorbed parameters, and constants computed from them."""
    found = {name for name in analysis.program.weights if _within_any(name, paths)}
    for node in analysis.program.nodes:
        if node.name in analysis.constants.computed and any(n in found for n in node.refs()):
            found.add(node.name)
    return found


def _within_any(source: str, paths: Iterable[str]) -> bool:
    return any(_within(source, path) for path in paths)


def _within(source: str, path: str) -> bool:
    return not path or source == path or source.startswith(f"{path}.")
