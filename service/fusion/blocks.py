"""Kernels block by block, for deploy checkpoints under a project's own keys.

The served program may fuse across what a project calls a block, or leave alone what it merges. A
deploy checkpoint needs exactly one kernel a block. Both come from the same analysis: a block's
kernel is the form of its last linear value relative to the block's input.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from service.errors import FusionError
from service.fusion.affine import Form
from service.fusion.analysis import Analysis
from service.fusion.cover import emitted_geometry, usable
from service.fusion.kernels import regrouped


def block_tensors(
    analysis: Analysis,
    blocks: Mapping[str, str],
    excluded: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Tensor]:
    """`{deploy path}.weight` and `.bias` (float32) of every block.

    `blocks` maps a block's dotted path to the path of its layer in the deploy form; `excluded` maps
    a block to the children that stay behind that layer. Raises FusionError for a block without a
    linear value, or whose value no single layer computes.
    """
    tensors = {}
    for block, deploy in blocks.items():
        form = block_form(analysis, block, (excluded or {}).get(block, ()))
        kernel = regrouped(form.weight(), form.geometry.groups, emitted_geometry(form).groups)
        prefix = f"{deploy}." if deploy else ""
        tensors[f"{prefix}weight"] = kernel.float().contiguous()
        tensors[f"{prefix}bias"] = form.bias.interior.float().contiguous()
    return tensors


def block_form(analysis: Analysis, block: str, excluded: tuple[str, ...] = ()) -> Form:
    """The form of a block's last linear value relative to the value that enters the block."""
    kept = tuple(f"{block}.{child}" if block else child for child in excluded)
    members = {
        node.name
        for node in analysis.program.nodes
        if _within(node.source, block) and not any(_within(node.source, path) for path in kept)
    }
    members -= analysis.constants.computed
    best: Form | None = None
    for node in analysis.program.nodes:
        if node.name not in members:
            continue
        for form in analysis.forms.get(node.name, {}).values():
            if form.nodes <= members and form.root not in members and usable(form):
                best = form
    if best is None:
        raise FusionError(f"The block {block!r} has no linear value that one layer computes.")
    return best


def _within(source: str, path: str) -> bool:
    return not path or source == path or source.startswith(f"{path}.")
