"""The Diverse Branch Block (Ding et al., CVPR 2021), keys as in DingXiaoH/DiverseBranchBlock."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import BNAndPad, ConvNorm, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show


class IdentityConv1x1(nn.Module):
    """A 1x1 convolution whose saved weight is the difference from the identity.

    The identity is not saved, so it must be added exactly once. Groups as in the block.
    """

    eye: Tensor

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(channels, channels // groups, 1, 1))
        self.register_buffer("eye", identity_kernel(channels, groups), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with weight and identity added: (N, C, H, W) -> the same."""
        return F.conv2d(x, self.weight + self.eye, groups=self.groups)


class DiverseBranchBlock(Reparameterizable):
    """Four branches of different complexity and receptive field, added (paper, figure 2).

    KxK; 1x1; 1x1 then KxK; 1x1 then average pooling. A depthwise block has no 1x1 branch and pools
    its input directly. `internal_channels` is the width between 1x1 and KxK: by default that of
    the input, or twice that when depthwise. Padding is always K // 2, as in the paper.
    """

    deploy_name = "dbb_reparam"
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        *,
        internal_channels: int | None = None,
        act: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2
        if padding not in (None, pad):
            raise ValueError(f"padding of a {kernel_size}x{kernel_size} block is always {pad}")
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, pad, groups=groups))
        depthwise = groups >= out_channels
        inner = internal_channels or (2 * in_channels if depthwise else in_channels)
        self.act = activation(act)
        self.dbb_origin = ConvNorm(self.geometry, eps)
        self.dbb_avg = nn.Sequential()
        self.dbb_1x1: ConvNorm | None = None
        if not depthwise:
            self.dbb_avg.add_module("conv", Geometry(*io, 1, groups=groups).conv(bias=False))
            self.dbb_avg.add_module("bn", BNAndPad(out_channels, pad, eps))
            self.dbb_1x1 = ConvNorm(Geometry(*io, 1, stride, groups=groups), eps)
        pool = nn.AvgPool2d(kernel_size, stride=stride, padding=pad if depthwise else 0)
        self.dbb_avg.add_module("avg", pool)
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(out_channels, eps=eps))
        self.dbb_1x1_kxk = nn.Sequential()
        if inner == in_channels:
            self.dbb_1x1_kxk.add_module("idconv1", IdentityConv1x1(in_channels, groups))
        else:
            reduce = Geometry(in_channels, inner, 1, groups=groups)
            self.dbb_1x1_kxk.add_module("conv1", reduce.conv(bias=False))
        self.dbb_1x1_kxk.add_module("bn1", BNAndPad(inner, pad, eps))
        expand = Geometry(inner, out_channels, kernel_size, stride, groups=groups)
        self.dbb_1x1_kxk.add_module("conv2", expand.conv(bias=False))
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(out_channels, eps=eps))

    def branches(self, x: Tensor) -> Tensor:
        """The sum of the four branches, or of three where a depthwise block has no 1x1."""
        out: Tensor = self.dbb_origin(x) + self.dbb_avg(x) + self.dbb_1x1_kxk(x)
        return out if self.dbb_1x1 is None else out + self.dbb_1x1(x)


def identity_kernel(channels: int, groups: int) -> Tensor:
    """(C, C / groups, 1, 1): the kernel that leaves its input as it is."""
    width = channels // groups
    eye = torch.zeros(channels, width, 1, 1)
    index = torch.arange(channels)
    eye[index, index % width] = 1.0
    return eye


def _read_block(keys: Keys, hints: Values) -> Reading:
    if keys.any("dbb_reparam."):
        return _read_folded(keys, hints)
    out, inner, size, _ = keys.shape("dbb_origin.conv.weight", "dbb_1x1_kxk.conv2.weight")
    width = keys.under("dbb_1x1_kxk.bn1.").width()
    groups = ratio(width, keys.shape("dbb_1x1_kxk.conv2.weight")[1])
    first = ("dbb_1x1_kxk.idconv1.weight", "dbb_1x1_kxk.conv1.weight")
    in_channels = keys.shape(*first)[1] * groups
    values: Values = {
        "in_channels": in_channels,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
        "stride": hints.get("stride", 1),
    }
    if width != in_channels * (2 if groups >= out else 1):
        values["internal_channels"] = width
    evidence = (
        f"`dbb_origin.conv.weight` is {show((out, inner, size, size))}.",
        f"{width} channels stand between 1x1 and KxK, in {groups} groups.",
    )
    return Reading(values, evidence, _ASSUMED)


def _read_folded(keys: Keys, hints: Values) -> Reading:
    out, inner, size, _ = keys.shape("dbb_reparam.weight")
    groups = hints.get("groups") or ratio(hints.get("in_channels", inner), inner)
    values: Values = {
        "in_channels": inner * groups,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
    }
    told = f"`groups` is taken to be {groups}, which a folded block does not tell."
    return Reading(values, ("`dbb_reparam` exists: the deploy form.",), (*_ASSUMED, told))


_ASSUMED = (
    "`stride` is taken to be 1, which the keys do not tell.",
    "`padding` is half the kernel, the only padding that the block has.",
    "`act` is taken to be none and batch norm's eps 1e-5, as in the repository.",
)

ROWS = (
    Family(
        family="dbb",
        network="DiverseBranchBlock",
        signature=re.compile(r"^dbb_(origin|avg|1x1|1x1_kxk|reparam)\."),
        read=_read_block,
        make=DiverseBranchBlock,
        size=32,
    ),
)
