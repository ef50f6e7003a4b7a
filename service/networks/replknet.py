"""RepLKNet (Ding et al., CVPR 2022) with the keys of DingXiaoH/RepLKNet-pytorch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvBN, ConvNorm, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio
from service.networks.vgg import unless_default


class LargeKernelConv(Reparameterizable):
    """A large and a small kernel, each with batch norm, added (paper, section 3.1).

    `small_kernel` 0 leaves the small one out. FastViT has the same block: its official forward
    computes an activation here and discards it, so there is none.
    """

    deploy_name = "lkb_reparam"
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        small_kernel: int = 0,
        act: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, kernel_size // 2, groups=groups))
        self.act = activation(act)
        self.lkb_origin = ConvNorm(self.geometry, eps)
        self.small_conv: ConvNorm | None = None
        if small_kernel:
            small = Geometry(*io, small_kernel, stride, small_kernel // 2, groups=groups)
            self.small_conv = ConvNorm(small, eps)

    def branches(self, x: Tensor) -> Tensor:
        """The large kernel plus, if there is one, the small kernel, each normed."""
        out: Tensor = self.lkb_origin(x)
        return out if self.small_conv is None else out + self.small_conv(x)


def unit(geometry: Geometry, act: str | None, *, deep: bool) -> nn.Module:
    """A convolution with batch norm; `deep` lets the deploy form fold it (`deep_fuse_BN`)."""
    if deep:
        return ConvBN(geometry, act=act)
    pair = ConvNorm(geometry)
    if act:
        pair.add_module("nonlinear", activation(act))
    return pair


class LargeKernelBlock(nn.Module):
    """Batch norm, 1x1, large kernel, ReLU, 1x1, as a residual."""

    def __init__(self, channels: int, inner: int, kernel: int, small: int, deep: bool) -> None:
        super().__init__()
        self.pw1 = unit(Geometry(channels, inner, 1), "relu", deep=deep)
        self.pw2 = unit(Geometry(inner, channels, 1), None, deep=deep)
        self.large_kernel = LargeKernelConv(inner, inner, kernel, groups=inner, small_kernel=small)
        self.prelkb_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, by way of `inner` channels; nothing follows the sum."""
        inner = F.relu(self.large_kernel(self.pw1(self.prelkb_bn(x))))
        out: Tensor = x + self.pw2(inner)
        return out


class ConvFFN(nn.Module):
    """Batch norm, 1x1, GELU, 1x1, as a residual."""

    def __init__(self, channels: int, inner: int, deep: bool) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(channels)
        self.pw1 = unit(Geometry(channels, inner, 1), None, deep=deep)
        self.pw2 = unit(Geometry(inner, channels, 1), None, deep=deep)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, by way of `inner` channels; nothing follows the sum."""
        out: Tensor = x + self.pw2(F.gelu(self.pw1(self.preffn_bn(x))))
        return out


class Stage(nn.Module):
    """Large-kernel and perceptron blocks in turn, under the key `blocks`."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, through the blocks in turn."""
        out: Tensor = self.blocks(x)
        return out


class RepLKNet(nn.Module):
    """A four-layer stem, stages of large-kernel blocks, transitions between them, a classifier.

    (N, in_channels, H, W) -> (N, num_classes). `num_blocks[i]` counts pairs of blocks in a stage,
    `kernel_sizes[i]` is its large kernel and `inner[i]` the width inside its large-kernel blocks
    (its own width by default). `deep_fuse` chooses the official deploy form in which every
    convolution-norm pair is folded; the plain one folds the large kernels only.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        kernel_sizes: Sequence[int],
        small_kernel: int = 5,
        inner: Sequence[int] | None = None,
        ffn_ratio: int = 4,
        deep_fuse: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        inner = inner or widths
        first = widths[0]
        stem = (
            Geometry(in_channels, first, 3, 2, 1),
            Geometry(first, first, 3, 1, 1, groups=first),
            Geometry(first, first, 1),
            Geometry(first, first, 3, 2, 1, groups=first),
        )
        self.stem = nn.Sequential(*(unit(g, "relu", deep=deep_fuse) for g in stem))
        self.stages = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            blocks: list[nn.Module] = []
            for _ in range(depth):
                kernel = kernel_sizes[index]
                blocks.append(
                    LargeKernelBlock(width, inner[index], kernel, small_kernel, deep_fuse)
                )
                blocks.append(ConvFFN(width, width * ffn_ratio, deep_fuse))
            self.stages.append(Stage(blocks))
            if index + 1 < len(widths):
                wider = widths[index + 1]
                steps = (Geometry(width, wider, 1), Geometry(wider, wider, 3, 2, 1, groups=wider))
                self.transitions.append(
                    nn.Sequential(*(unit(g, "relu", deep=deep_fuse) for g in steps))
                )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); the stem divides H and W by 4, each transition by 2."""
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < len(self.transitions):
                x = self.transitions[index](x)
        x = torch.flatten(F.adaptive_avg_pool2d(self.norm(x), 1), 1)
        logits: Tensor = self.head(x)
        return logits


def _published(first: int, kernels: Sequence[int], **more: int | Sequence[int]) -> Values:
    widths = [first * 2**i for i in range(4)]
    return {"num_blocks": [2, 2, 18, 2], "widths": widths, "kernel_sizes": list(kernels), **more}


REPLKNET: Mapping[str, Values] = {
    "RepLKNet-31B": _published(128, (31, 29, 27, 13)),
    "RepLKNet-31L": _published(192, (31, 29, 27, 13)),
    "RepLKNet-XL": _published(256, (27, 27, 27, 13), small_kernel=0, inner=[384, 768, 1536, 3072]),
}
"""The published networks (paper, table 5)."""

_KERNELS = ("large_kernel.lkb_origin.conv.weight", "large_kernel.lkb_reparam.weight")


def _read(keys: Keys, hints: Values) -> Reading:
    stages = [keys.under(f"stages.{i}.blocks.") for i in range(keys.count("stages."))]
    widths = [stage.under("0.prelkb_bn.").width() for stage in stages]
    large = [stage.under("0.").shape(*_KERNELS) for stage in stages]
    inner = [shape[0] for shape in large]
    wide = [stage.under("1.pw1.").width() for stage in stages]
    small = 0
    if keys.any("stages.0.blocks.0.large_kernel.small_conv."):
        small = keys.shape("stages.0.blocks.0.large_kernel.small_conv.conv.weight")[2]
    classes = keys.shape("head.weight", rank=2)[0]
    values: Values = {
        "num_blocks": [stage.count("") // 2 for stage in stages],
        "widths": widths,
        "kernel_sizes": [shape[2] for shape in large],
        "inner": unless_default(widths, inner),
        "ffn_ratio": ratio(wide[0], widths[0]) if widths else 4,
        "in_channels": keys.shape("stem.0.conv.weight")[1],
        "num_classes": classes,
    }
    if not keys.any("stages.0.blocks.0.large_kernel.lkb_reparam."):
        values["small_kernel"] = small
    if "stem.0.conv.bias" in keys:
        values["deep_fuse"] = True
    evidence = (
        f"The stages hold {values['num_blocks']} pairs of blocks of {widths} channels.",
        f"Their large kernels are {values['kernel_sizes']} wide, with {small} beside them.",
        f"`head.weight` has {classes} rows, one a class.",
    )
    assumed = (
        "`deep_fuse` is taken to be false: the deploy checkpoint folds large kernels only.",
        "The activation is ReLU after large kernels and GELU in perceptrons; eps is 1e-5.",
    )
    return Reading(values, evidence, assumed)


def _read_block(keys: Keys, hints: Values) -> Reading:
    names = ("lkb_origin.conv.weight", "lkb_reparam.weight")
    out, inner, size, _ = keys.shape(*names)
    groups = hints.get("groups") or ratio(hints.get("in_channels", inner), inner)
    values: Values = {
        "in_channels": inner * groups,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
    }
    if keys.any("small_conv."):
        values["small_kernel"] = keys.shape("small_conv.conv.weight")[2]
    evidence = (
        f"A {size}x{size} kernel `lkb_origin` with {values.get('small_kernel', 0)} beside it."
    )
    assumed = (
        "`stride` is taken to be 1.",
        f"`groups` is taken to be {groups}, which the keys do not tell.",
        "`act` is taken to be none and batch norm's eps 1e-5.",
    )
    return Reading(values, (evidence,), assumed)


ROWS = (
    Family(
        family="replknet",
        network="RepLKNet",
        signature=re.compile(r"^stages\.[0-9]+\.blocks\.[0-9]+\.(large_kernel|prelkb_bn)\."),
        read=_read,
        make=RepLKNet,
        named=REPLKNET,
    ),
    Family(
        family="replknet",
        network="ReparamLargeKernelConv",
        signature=re.compile(r"^(lkb_origin|lkb_reparam)\."),
        read=_read_block,
        make=LargeKernelConv,
        size=32,
    ),
)
