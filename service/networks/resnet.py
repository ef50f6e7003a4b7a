"""The ResNets of the DBB, ACNet-in-DBB and OREPA repositories, built of one kind of block."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio
from service.networks.units import UNITS, Unit, UnitKind, plain_unit


class BasicBlock(nn.Module):
    """Two 3x3 units and a shortcut, then ReLU."""

    def __init__(self, unit: Unit, in_channels: int, planes: int, stride: int, groups: int) -> None:
        super().__init__()
        # The OREPA repository leaves this shortcut plain; elsewhere a 1x1 unit is plain anyway.
        self.shortcut = _shortcut(plain_unit, in_channels, planes, stride)
        self.conv1 = unit(Geometry(in_channels, planes, 3, stride, 1, groups=groups), "relu")
        self.conv2 = unit(Geometry(planes, planes, 3, 1, 1, groups=groups), None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, planes, H', W'); the stride divides the sides, rounded up."""
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which may be strided) and 1x1 units and a shortcut, then ReLU.

    It ends `expansion` times as wide as it is inside: 4 in ResNet, 2 in ResNeXt-50 32x4d.
    """

    def __init__(
        self,
        unit: Unit,
        in_channels: int,
        planes: int,
        stride: int,
        groups: int,
        expansion: int,
    ) -> None:
        super().__init__()
        outer = planes * expansion
        self.shortcut = _shortcut(unit, in_channels, outer, stride)
        self.conv1 = unit(Geometry(in_channels, planes, 1), "relu")
        self.conv2 = unit(Geometry(planes, planes, 3, stride, 1, groups=groups), "relu")
        self.conv3 = unit(Geometry(planes, outer, 1), None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, planes * expansion, H', W'), sides over the stride rounded up."""
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


def _shortcut(unit: Unit, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return unit(Geometry(in_channels, out_channels, 1, stride), None)


class ResNet(nn.Module):
    """A ResNet whose convolutions are units of one kind.

    (N, in_channels, H, W) -> (N, num_classes). `unit` is a key of UNITS, `block` is "basic" or
    "bottleneck". `planes[i]` is the inner width of `stage{i+1}` and `strides[i]` the stride of its
    first block; `expansion` widens bottlenecks. Small images want `stem_kernel=3,
    stem_stride=1, stem_pool=False`.
    """

    def __init__(
        self,
        unit: str,
        block: str,
        num_blocks: Sequence[int],
        planes: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] | None = None,
        stem_width: int = 64,
        stem_kernel: int = 7,
        stem_stride: int = 2,
        stem_pool: bool = True,
        groups: int = 1,
        expansion: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        make = UNITS[unit].make
        if block not in ("basic", "bottleneck"):
            raise ValueError(f"block must be basic or bottleneck, not {block!r}")
        basic = block == "basic"
        strides = strides or [1] + [2] * (len(num_blocks) - 1)
        stem = Geometry(in_channels, stem_width, stem_kernel, stem_stride, stem_kernel // 2)
        self.stage0 = nn.Sequential()
        self.stage0.add_module("conv1", make(stem, "relu"))
        if stem_pool:
            self.stage0.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        channels = stem_width
        self.num_stages = len(num_blocks)
        for index, (depth, width) in enumerate(zip(num_blocks, planes, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = strides[index] if place == 0 else 1
                if basic:
                    stage.append(BasicBlock(make, channels, width, stride, groups))
                else:
                    stage.append(Bottleneck(make, channels, width, stride, groups, expansion))
                channels = width if basic else width * expansion
            self.add_module(f"stage{index + 1}", stage)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the last stage's channel means."""
        for index in range(self.num_stages + 1):
            x = self.get_submodule(f"stage{index}")(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


DEPTHS: Mapping[str, dict[str, Any]] = {
    "ResNet-18": {"block": "basic", "num_blocks": [2, 2, 2, 2]},
    "ResNet-34": {"block": "basic", "num_blocks": [3, 4, 6, 3]},
    "ResNet-50": {"block": "bottleneck", "num_blocks": [3, 4, 6, 3]},
    "ResNet-101": {"block": "bottleneck", "num_blocks": [3, 4, 23, 3]},
    "ResNeXt-50": {
        "block": "bottleneck",
        "num_blocks": [3, 4, 6, 3],
        "planes": [128, 256, 512, 1024],
        "groups": 32,
        "expansion": 2,
    },
}
"""The published networks (He et al., CVPR 2016, table 1; Xie et al., CVPR 2017, table 1)."""


def _read(kind: UnitKind, keys: Keys, hints: Values) -> Reading:
    stages = keys.count("stage") - 1
    stem = keys.under("stage0.conv1.")
    width, in_channels, kernel, _ = stem.shape(*kind.kernels)
    if stem.any("weight0."):
        kernel = 2 * stem.count("weight") + 1  # composed of 3x3 kernels
    bottleneck = keys.any("stage1.0.conv3.")
    depths, planes, strides = [], [], []
    for index in range(1, stages + 1):
        stage = keys.under(f"stage{index}.")
        depths.append(stage.count(""))
        planes.append(stage.under("0.conv1.").width())
        strides.append(2 if index > 1 and stage.any("0.shortcut.") else 1)
    inner = keys.under("stage1.0.conv2.").shape(*kind.kernels)[1]
    outer = keys.under("stage1.0.conv3.").width() if bottleneck else 0
    values: Values = {
        "block": "bottleneck" if bottleneck else "basic",
        "num_blocks": depths,
        "planes": planes,
        "strides": None if strides == [1] + [2] * (stages - 1) else strides,
        "stem_width": width,
        "stem_kernel": kernel,
        "stem_stride": 2 if kernel >= 7 else 1,
        "stem_pool": kernel >= 7,
        "groups": ratio(planes[0], inner) if planes else 1,
        "expansion": ratio(outer, planes[0]) if bottleneck and planes else 4,
        "in_channels": in_channels,
        "num_classes": keys.shape("linear.weight", rank=2)[0],
    }
    evidence = (
        f"The residual blocks hold {kind.title} units.",
        f"Stages 1 to {stages} hold {depths} {values['block']} blocks of {planes} planes.",
        f"`linear.weight` has {values['num_classes']} rows, one a class.",
    )
    small = "1 without pooling, as for small images" if kernel < 7 else "2 and pooling follows"
    assumed = (
        "`strides` are 2 where a later stage begins with a shortcut convolution.",
        f"`stem_stride` of a {kernel}x{kernel} stem is taken to be {small}.",
        "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository.",
    )
    return Reading(values, evidence, assumed)


def _row(key: str, kind: UnitKind) -> Family:
    return Family(
        family=kind.family,
        network=f"{kind.title}-ResNet",
        signature=re.compile(rf"^stage[0-9]+\.([0-9]+\.)?(conv[0-9]|shortcut)\.{kind.signature}"),
        read=partial(_read, kind),
        make=partial(ResNet, key),
        named={f"{kind.title}-{name}": values for name, values in DEPTHS.items()},
    )


ROWS = tuple(_row(key, kind) for key, kind in UNITS.items())
