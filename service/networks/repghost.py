"""RepGhost (Chen et al., 2022) with the keys of ChengpengChen/RepGhost, which timm shares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys


def divisible(value: float, divisor: int = 4) -> int:
    """`value` rounded to a multiple of `divisor`, but never more than a tenth down."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class RepGhostModule(Reparameterizable):
    """A 1x1 convolution, then a depthwise 3x3 with norm beside a normed identity (figure 3d).

    The 1x1 and its batch norm stay as they are; the deploy layer is the depthwise one. `normed` is
    the identity with batch norm, `identity` a bare one, which has no keys.
    """

    deploy_name = "cheap_operation"
    entry = ("primary_conv",)
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        relu: bool = True,
        normed: bool = True,
        identity: bool = False,
    ) -> None:
        super().__init__(Geometry(out_channels, out_channels, 3, 1, 1, groups=out_channels))
        self.act = nn.ReLU() if relu else nn.Identity()
        self.primary_conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU() if relu else nn.Identity(),
        )
        self.fusion_bn = nn.Sequential()
        if normed:
            self.fusion_bn.append(nn.BatchNorm2d(out_channels))
        self.identity = identity
        self.cheap_operation = nn.Sequential(
            self.geometry.conv(bias=False), nn.BatchNorm2d(out_channels)
        )

    def branches(self, x: Tensor) -> Tensor:
        """The normed depthwise layer, plus the input normed or bare, where it has that."""
        out: Tensor = self.cheap_operation(x)
        for norm in self.fusion_bn:
            out = out + norm(x)
        return out + x if self.identity else out


class Gate(nn.Module):
    """Squeeze-and-excitation with a hard sigmoid."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, inner, 1)
        self.conv_expand = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x` times a gate in [0, 1], one for each image and channel."""
        gate = self.conv_expand(F.relu(self.conv_reduce(F.adaptive_avg_pool2d(x, 1))))
        return x * (F.relu6(gate + 3) / 6)


class Bottleneck(nn.Module):
    """Two RepGhost modules, between them a strided depthwise layer and a gate where called for."""

    def __init__(
        self,
        in_channels: int,
        inner: int,
        out_channels: int,
        kernel: int,
        stride: int,
        gate: int,
        *,
        shortcut: bool,
        normed: bool,
        identity: bool,
    ) -> None:
        super().__init__()
        self.ghost1 = RepGhostModule(in_channels, inner, normed=normed, identity=identity)
        self.strided = stride > 1
        if self.strided:
            depthwise = Geometry(inner, inner, kernel, stride, kernel // 2, groups=inner)
            self.conv_dw = depthwise.conv(bias=False)
            self.bn_dw = nn.BatchNorm2d(inner)
        self.se = Gate(inner, gate) if gate else nn.Identity()
        self.ghost2 = RepGhostModule(
            inner, out_channels, relu=False, normed=normed, identity=identity
        )
        same = in_channels == out_channels and not self.strided
        self.residual = shortcut or not same
        self.shortcut = nn.Sequential()
        if not same:
            beside = Geometry(
                in_channels, in_channels, kernel, stride, kernel // 2, groups=in_channels
            )
            self.shortcut.extend(
                [
                    beside.conv(bias=False),
                    nn.BatchNorm2d(in_channels),
                    nn.Conv2d(in_channels, out_channels, 1, bias=False),
                    nn.BatchNorm2d(out_channels),
                ]
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H', W'); the stride divides the sides, rounded up."""
        out: Tensor = self.ghost1(x)
        if self.strided:
            out = self.bn_dw(self.conv_dw(out))
        out = self.ghost2(self.se(out))
        return out + self.shortcut(x) if self.residual else out


class _ConvNormAct(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv(x)))


class RepGhostNet(nn.Module):
    """A stem, stages of bottlenecks, a 1x1 layer and a two-layer head.

    (N, in_channels, H, W) -> (N, num_classes). `stages[i][j]` is (inner channels, output channels,
    depthwise kernel, stride, inner channels of the gate or 0) of one bottleneck. `shortcut`,
    `normed` and `identity` choose the published variants "wo", the default and "repid".
    """

    def __init__(
        self,
        stages: Sequence[Sequence[Sequence[int]]],
        stem_width: int,
        last_width: int,
        head_width: int = 1280,
        shortcut: bool = True,
        normed: bool = True,
        identity: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(in_channels, stem_width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_width)
        channels = stem_width
        self.blocks = nn.Sequential()
        for rows in stages:
            stage = nn.Sequential()
            for inner, outer, kernel, stride, gate in rows:
                stage.append(
                    Bottleneck(
                        channels,
                        inner,
                        outer,
                        kernel,
                        stride,
                        gate,
                        shortcut=shortcut,
                        normed=normed,
                        identity=identity,
                    )
                )
                channels = outer
            self.blocks.append(stage)
        self.blocks.append(nn.Sequential(_ConvNormAct(channels, last_width)))
        self.conv_head = nn.Conv2d(last_width, head_width, 1)
        self.classifier = nn.Linear(head_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); `conv_head` comes after the pooling, so it sees one position."""
        x = self.blocks(F.relu(self.bn1(self.conv_stem(x))))
        x = F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1)))
        logits: Tensor = self.classifier(torch.flatten(x, 1))
        return logits


_TABLE = (
    ((3, 8, 16, False, 1),),
    ((3, 24, 24, False, 2),),
    ((3, 36, 24, False, 1),),
    ((5, 36, 40, True, 2),),
    ((5, 60, 40, True, 1),),
    ((3, 120, 80, False, 2),),
    (
        (3, 100, 80, False, 1),
        (3, 120, 80, False, 1),
        (3, 120, 80, False, 1),
        (3, 240, 112, True, 1),
        (3, 336, 112, True, 1),
    ),
    ((5, 336, 160, True, 2),),
    ((5, 480, 160, False, 1), (5, 480, 160, True, 1)) * 2,
)
"""Kernel, inner and output channels, gate, stride of each bottleneck at width 1 (table 3)."""


def _published(width: float, **more: bool) -> Values:
    stem = divisible(16 * width)
    stages, channels = [], stem
    for rows in _TABLE:
        stage = []
        for kernel, inner, outer, gated, stride in rows:
            mid, out = divisible(inner * width), divisible(outer * width)
            gate = divisible(mid * 0.25) if gated else 0
            # Where the keys do not show the kernel, it is not used either.
            shown = stride > 1 or channels != out
            stage.append([mid, out, kernel if shown else 3, stride, gate])
            channels = out
        stages.append(stage)
    last = divisible(480 * width * 2)
    return {"stages": stages, "stem_width": stem, "last_width": last, **more}


REPGHOST: Mapping[str, Values] = {
    **{
        f"RepGhostNet-{width:g}x": _published(width)
        for width in (0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5, 2.0)
    },
    "RepGhostNet-repid-0.5x": _published(0.5, normed=False, identity=True),
    "RepGhostNet-wo-0.5x": _published(0.5, shortcut=False),
}


def _read(keys: Keys, hints: Values) -> Reading:
    last = keys.count("blocks.") - 1
    stages, normed, kept = [], False, False
    for index in range(last):
        stage = keys.under(f"blocks.{index}.")
        rows = []
        for place in range(stage.count("")):
            block = stage.under(f"{place}.")
            inner = block.under("ghost1.primary_conv.").width()
            outer = block.under("ghost2.primary_conv.").width()
            kernel, stride, gate = 3, 1, 0
            if "shortcut.0.weight" in block:
                kernel = block.shape("shortcut.0.weight")[2]
            if block.any("conv_dw."):
                kernel, stride = block.shape("conv_dw.weight")[2], 2
            if block.any("se."):
                gate = block.shape("se.conv_reduce.bias", rank=1)[0]
            normed = normed or block.any("ghost1.fusion_bn.")
            kept = kept or block.any("ghost1.cheap_operation.0.")
            rows.append([inner, outer, kernel, stride, gate])
        stages.append(rows)
    classes, head = keys.shape("classifier.weight", rank=2)
    values: Values = {
        "stages": stages,
        "stem_width": keys.shape("conv_stem.weight")[0],
        "last_width": keys.under(f"blocks.{last}.").width(),
        "head_width": head,
        "in_channels": keys.shape("conv_stem.weight")[1],
        "num_classes": classes,
    }
    if kept:
        # Without a normed identity the published variant is the one with a bare identity.
        values |= {"normed": normed, "identity": not normed}
    evidence = (
        f"`blocks` holds stages of {[len(rows) for rows in stages]} bottlenecks.",
        "`fusion_bn` norms the identity beside each depthwise layer."
        if normed
        else "No `fusion_bn` exists.",
        f"`classifier.weight` has {classes} rows, one a class.",
    )
    assumed = (
        "`shortcut` is taken to exist everywhere; where shape allows, it has no keys.",
        f"`identity` is taken to be {not normed and kept}; a bare identity has no keys.",
        "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository.",
    )
    return Reading(values, evidence, assumed)


ROWS = (
    Family(
        family="repghost",
        network="RepGhostNet",
        signature=re.compile(r"^blocks\.[0-9]+\.[0-9]+\.ghost[12]\.(primary_conv|cheap_operation)"),
        read=_read,
        make=RepGhostNet,
        named=REPGHOST,
    ),
)
