"""MobileOne (Vasu et al., CVPR 2023) with the keys of apple/ml-mobileone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNorm, SqueezeExcite, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show
from service.networks.vgg import unless_default


class MobileOneBlock(Reparameterizable):
    """Several KxK branches, a 1x1 one and an identity, each with batch norm (paper, figure 3).

    `conv_branches` may be 0; `scale` is the 1x1 branch, which K = 1 never has; `skip` is the
    identity, by default where shape allows. Squeeze-and-excitation with `se` inner channels (0 for
    none) stands before the activation.
    """

    deploy_name = "reparam_conv"
    tail = ("se", "act")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        conv_branches: int = 1,
        scale: bool = True,
        skip: bool | None = None,
        se: int = 0,
        act: str | None = "relu",
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2 if padding is None else padding
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, pad, dilation, groups))
        self.se = SqueezeExcite(out_channels, se, ("reduce", "expand")) if se else nn.Identity()
        self.act = activation(act)
        if skip is None:
            skip = in_channels == out_channels and stride == 1
        self.rbr_skip = nn.BatchNorm2d(in_channels, eps=eps) if skip else None
        self.rbr_conv = nn.ModuleList(ConvNorm(self.geometry, eps) for _ in range(conv_branches))
        point = Geometry(*io, 1, stride, pad - kernel_size // 2, groups=groups)
        self.rbr_scale = ConvNorm(point, eps) if scale and kernel_size > 1 else None

    def branches(self, x: Tensor) -> Tensor:
        """The sum of KxK branches, 1x1 and identity, of which at least one must exist."""
        outs: list[Tensor] = [branch(x) for branch in self.rbr_conv]
        if self.rbr_scale is not None:
            outs.append(self.rbr_scale(x))
        if self.rbr_skip is not None:
            outs.append(self.rbr_skip(x))
        total = outs[0]
        for out in outs[1:]:
            total = total + out
        return total


class MobileOne(nn.Module):
    """A strided stem and four stages of depthwise and pointwise blocks.

    (N, in_channels, H, W) -> (N, num_classes). `num_blocks[i]` counts pairs of blocks in
    `stage{i+1}`; its last `se_blocks[i]` pairs have squeeze-and-excitation over a sixteenth of the
    channels. Every block but the stem has `conv_branches` KxK branches.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_blocks: Sequence[int] = (2, 8, 10, 1),
        conv_branches: int = 1,
        se_blocks: Sequence[int] | None = None,
        stem_width: int | None = None,
        stem_stride: int = 2,
        strides: Sequence[int] | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        channels = stem_width or min(64, widths[0])
        se_blocks = se_blocks or [0] * len(num_blocks)
        strides = strides or [2] * len(num_blocks)
        self.stage0 = MobileOneBlock(in_channels, channels, 3, stem_stride, eps=eps)
        self.num_stages = len(num_blocks)
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                gated = place >= depth - se_blocks[index]
                for io, kernel, groups in (
                    ((channels, channels), 3, channels),
                    ((channels, width), 1, 1),
                ):
                    stage.append(
                        MobileOneBlock(
                            *io,
                            kernel,
                            strides[index] if place == 0 and kernel == 3 else 1,
                            groups=groups,
                            conv_branches=conv_branches,
                            se=io[1] // 16 if gated else 0,
                            eps=eps,
                        )
                    )
                channels = width
            self.add_module(f"stage{index + 1}", stage)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); stem and stages divide H and W by their strides, rounded up."""
        for index in range(self.num_stages + 1):
            x = self.get_submodule(f"stage{index}")(x)
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _published(multipliers: Sequence[float], **more: Any) -> dict[str, Any]:
    return {"widths": [int(64 * 2**i * m) for i, m in enumerate(multipliers)], **more}


MOBILEONE: Mapping[str, Values] = {
    "MobileOne-s0": _published((0.75, 1.0, 1.0, 2.0), conv_branches=4),
    "MobileOne-s1": _published((1.5, 1.5, 2.0, 2.5)),
    "MobileOne-s2": _published((1.5, 2.0, 2.5, 4.0)),
    "MobileOne-s3": _published((2.0, 2.5, 3.0, 4.0)),
    "MobileOne-s4": _published((3.0, 3.5, 3.5, 4.0), se_blocks=[0, 0, 5, 1]),
}
"""The published networks (paper, table 2)."""

KERNELS = ("rbr_conv.0.conv.weight", "reparam_conv.weight")
_ASSUMED = "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository."


def _read_network(keys: Keys, hints: Values) -> Reading:
    stages = [keys.under(f"stage{i}.") for i in range(1, keys.count("stage"))]
    depths = [stage.count("") // 2 for stage in stages]
    widths = [stage.under(f"{2 * d - 1}.").width() for stage, d in zip(stages, depths, strict=True)]
    stem = keys.under("stage0.")
    gated = [
        sum(stage.any(f"{2 * i}.se.") for i in range(depth))
        for stage, depth in zip(stages, depths, strict=True)
    ]
    narrow = min(64, widths[0]) if widths else 0
    values: Values = {
        "widths": widths,
        "num_blocks": depths,
        "se_blocks": unless_default([0] * len(depths), gated),
        "stem_width": unless_default(narrow, stem.width()),
        "in_channels": stem.shape(*KERNELS)[1],
        "num_classes": keys.shape("linear.weight", rank=2)[0],
    }
    if not keys.any("stage1.0.reparam_conv."):
        values["conv_branches"] = keys.count("stage1.0.rbr_conv.")
    evidence = (
        f"Stages 1 to {len(depths)} hold {depths} pairs of blocks that end {widths} wide.",
        f"`stage1.0.rbr_conv` has {values.get('conv_branches', 'no')} branches (the stem has one).",
        f"{gated} pairs have squeeze-and-excitation.",
    )
    assumed = ("`strides` are 2 in the first block of each stage.", "`stem_stride` is 2.", _ASSUMED)
    return Reading(values, evidence, assumed)


def read_block(keys: Keys, hints: Values) -> Reading:
    """Read one MobileOneBlock, also one of FastViT's without KxK branches."""
    kernel = next((key for key in KERNELS if key in keys), KERNELS[0])
    out, inner, size, _ = keys.shape(kernel)
    skip = keys.any("rbr_skip.")
    groups = ratio(out, inner) if skip else hints.get("groups")
    groups = groups or ratio(hints.get("in_channels", inner), inner)
    values: Values = {
        "in_channels": inner * groups,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
        "stride": hints.get("stride", 1),
    }
    if not keys.any("reparam_conv."):
        values |= {
            "conv_branches": keys.count("rbr_conv."),
            "scale": keys.any("rbr_scale."),
            "skip": skip,
        }
    if keys.any("se."):
        values["se"] = keys.shape("se.reduce.bias", rank=1)[0]
    evidence = f"`{kernel}` is {show(keys.shape(kernel))}: a MobileOne block."
    return Reading(values, (evidence,), ("`stride` is taken to be 1.", _ASSUMED))


_BRANCH = r"(rbr_skip|rbr_conv\.[0-9]+|rbr_scale|reparam_conv)\."

ROWS = (
    Family(
        family="mobileone",
        network="MobileOne",
        signature=re.compile(r"^stage[0-9]+\.([0-9]+\.)?" + _BRANCH),
        read=_read_network,
        make=MobileOne,
        named=MOBILEONE,
    ),
    Family(
        family="mobileone",
        network="MobileOneBlock",
        signature=re.compile(r"^rbr_(conv|scale|skip)\.|^reparam_conv\."),
        read=read_block,
        make=MobileOneBlock,
        size=32,
    ),
)
