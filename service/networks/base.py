"""What every re-parameterizable block is, and the two things that follow from it alone.

A block computes `tail(branches(entry(x)))`: `branches` is linear in evaluation mode, so that it can
become one convolution; `entry`, which few blocks have, and `tail` (squeeze-and-excitation, an
activation) stay as they are. A block only declares; how branches become one kernel is the business
of `service.fusion`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """The one convolution that a block equals: its channels, its kernel, its movement."""

    in_channels: int
    out_channels: int
    kernel_size: int | tuple[int, int]
    stride: int = 1
    padding: int | tuple[int, int] = 0
    dilation: int = 1
    groups: int = 1

    def conv(self, *, bias: bool) -> nn.Conv2d:
        """A freshly initialised convolution of this geometry."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=bias,
        )


class Reparameterizable(nn.Module):
    """A multi-branch block that equals one layer in evaluation mode.

    Subclasses set `deploy_name` (the official name of that one layer inside the block; empty where
    the layer takes the block's own place), list in `kept` the children that entry and tail use,
    and define `branches`. `stored` are children that the official deploy form stores without using
    them. Input and output are (N, C, H, W) float tensors.
    """

    deploy_name: ClassVar[str]
    kept: ClassVar[tuple[str, ...]] = ()
    stored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.folded = False

    def entry(self, x: Tensor) -> Tensor:
        """What precedes the branches; nothing by default."""
        return x

    def branches(self, x: Tensor) -> Tensor:
        """The linear multi-branch part."""
        raise NotImplementedError

    def tail(self, x: Tensor) -> Tensor:
        """What follows the branches; nothing by default."""
        return x

    def deploy_layer(self) -> nn.Module:
        """The plain layer that the branches equal, not yet holding their weights."""
        return self.geometry.conv(bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if self.folded:
            return self.tail(self.get_submodule(self.deploy_name)(x))
        return self.tail(self.branches(x))


def blocks_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Reparameterizable]]:
    """Every outermost re-parameterizable block with its dotted path, in registration order.

    A block inside the branches of another is part of that one; a block that a tail uses is not.
    """
    if isinstance(module, Reparameterizable):
        yield prefix, module
        children = {name: getattr(module, name) for name in module.kept if hasattr(module, name)}
    else:
        children = dict(module.named_children())
    for name, child in children.items():
        if isinstance(child, nn.Module):
            yield from blocks_of(child, join(prefix, name))


def deploy_names(module: nn.Module) -> dict[str, str]:
    """Block path -> path of its layer in the official deploy form.

    For RepVGG `{"stage1.0": "stage1.0.rbr_reparam", ...}`; a bare block has the path "".
    """
    return {path: join(path, block.deploy_name) for path, block in blocks_of(module)}


def deploy_skeleton(module: nn.Module) -> nn.Module:
    """A copy in which every block holds one plain layer under its official deploy key.

    A module that is no block itself may list in `absorbed` the paths of its own modules and
    parameters that its blocks' layers take over; they become None.

    The layers hold fresh weights: a deploy-form state dict is loaded into the result strictly.
    The input is not changed.
    """
    if isinstance(module, Reparameterizable) and not module.deploy_name:
        return module.deploy_layer().train(module.training)
    skeleton = copy.deepcopy(module)
    _fold_children(skeleton)
    return skeleton


def _fold_children(module: nn.Module) -> None:
    if isinstance(module, Reparameterizable):
        _drop_branches(module)
    for path in getattr(module, "absorbed", ()):
        # What a block's layer takes over from outside the block: a norm, a shift, a scale.
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, None)
    for name, child in list(module.named_children()):
        if isinstance(child, Reparameterizable) and not child.deploy_name:
            setattr(module, name, child.deploy_layer().train(child.training))
        else:
            _fold_children(child)


def _drop_branches(block: Reparameterizable) -> None:
    own = {*block._modules, *block._parameters, *block._buffers}
    for name in own - {*block.kept, *block.stored}:
        delattr(block, name)
    block.folded = True
    parent: nn.Module = block
    *containers, last = block.deploy_name.split(".")
    for name in containers:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, block.deploy_layer().train(block.training))


def join(prefix: str, name: str) -> str:
    """The dotted path of `name` under `prefix`, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
