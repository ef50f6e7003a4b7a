"""What every re-parameterizable block is, and the two things that follow from it alone.

A block computes `tail(branches(entry(x)))`: `branches` is linear in evaluation mode, so that it can
become one convolution; `entry`, which few blocks have, and `tail` (squeeze-and-excitation, an
activation) stay as they are. The training form and the deploy form are two classes, and the second
is made from the first. How branches become one kernel is the business of `service.fusion`.
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
    """A multi-branch block in its training form: entry, branches, tail.

    Subclasses define `branches`, which equals one layer in evaluation mode, and declare the rest:
    `entry` and `tail` name the children that precede and follow the branches, in order, and
    `deploy_name` is the official name of the one layer inside the block (empty where the layer
    takes the block's own place). `stored` are children that the official deploy form stores
    without using them. Input and output are (N, C, H, W) float tensors.
    """

    deploy_name: ClassVar[str]
    entry: ClassVar[tuple[str, ...]] = ()
    tail: ClassVar[tuple[str, ...]] = ()
    stored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry

    @property
    def kept(self) -> tuple[str, ...]:
        """The children that the deploy form uses as they are."""
        return self.entry + self.tail

    def branches(self, x: Tensor) -> Tensor:
        """The linear multi-branch part."""
        raise NotImplementedError

    def deploy_layer(self) -> nn.Module:
        """The plain layer that the branches equal, not yet holding their weights."""
        return self.geometry.conv(bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """`tail(branches(entry(x)))`; the deploy form equals it in evaluation mode only."""
        return _through(self, self.tail, self.branches(_through(self, self.entry, x)))


class DeployBlock(nn.Module):
    """The deploy form of a block: its layer under the official key, between its entry and tail.

    It has copies of what the block keeps, and nothing of its branches.
    """

    def __init__(self, block: Reparameterizable) -> None:
        super().__init__()
        self.entry, self.tail, self.layer = block.entry, block.tail, block.deploy_name
        for name, child in block.named_children():
            if name in {*block.kept, *block.stored}:
                self.add_module(name, deploy_skeleton(child))
        *containers, last = block.deploy_name.split(".")
        parent: nn.Module = self
        for name in containers:
            parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, block.deploy_layer())
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """`tail(layer(entry(x)))`: what the block gave in evaluation mode, but for rounding."""
        x = self.get_submodule(self.layer)(_through(self, self.entry, x))
        return _through(self, self.tail, x)


def _through(module: nn.Module, children: tuple[str, ...], x: Tensor) -> Tensor:
    for name in children:
        x = module.get_submodule(name)(x)
    return x


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
    """A copy in which every block is its deploy form: one plain layer under its official key.

    A module that is no block itself may list in `absorbed` the paths of its own modules and
    parameters that its blocks' layers take over; they become None.

    The layers hold fresh weights: a deploy-form state dict is loaded into the result strictly.
    The input is not changed, and the weights of its branches are not copied.
    """
    blocks = [block for _, block in blocks_of(module)]
    skeleton = copy.deepcopy(module, {id(block): _deployed(block) for block in blocks})
    for part in list(skeleton.modules()):
        for path in getattr(part, "absorbed", ()):
            parent, _, name = path.rpartition(".")
            setattr(part.get_submodule(parent), name, None)
    return skeleton


def _deployed(block: Reparameterizable) -> nn.Module:
    return DeployBlock(block) if block.deploy_name else block.deploy_layer().train(block.training)


def join(prefix: str, name: str) -> str:
    """The dotted path of `name` under `prefix`, either of which may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name
