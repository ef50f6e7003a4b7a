"""UniRepLKNet (Ding et al., CVPR 2024) with the keys of AILab-CVC/UniRepLKNet.

The official code runs its perceptrons channels-last; here they are 1x1 convolutions with the same
weights, which is the same function and lets them fold.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import SqueezeExcite
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show
from service.networks.vgg import unless_default

DILATED: Mapping[int, tuple[tuple[int, int], ...]] = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}
"""Kernel -> (size, dilation) of each branch beside it (paper, section 3.1 and repository)."""


class DilatedReparamBlock(Reparameterizable):
    """A large depthwise kernel and dilated small ones, each with batch norm, added (figure 3).

    The dilation of a branch stands only in its key: `dil_conv_k{size}_{dilation}`.
    """

    deploy_name = "lk_origin"

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilated: Sequence[Sequence[int]] | None = None,
        *,
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2
        super().__init__(Geometry(channels, channels, kernel_size, 1, pad, groups=channels))
        self.dilated = [(k, r) for k, r in (dilated or DILATED[kernel_size])]
        self.lk_origin = self.geometry.conv(bias=False)
        self.origin_bn = nn.BatchNorm2d(channels, eps=eps)
        for k, r in self.dilated:
            branch = Geometry(channels, channels, k, 1, r * (k - 1) // 2, r, channels)
            self.add_module(f"dil_conv_k{k}_{r}", branch.conv(bias=False))
            self.add_module(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(channels, eps=eps))

    def branches(self, x: Tensor) -> Tensor:
        """The large kernel and the dilated ones, each normed, added: (N, C, H, W) -> the same."""
        out: Tensor = self.origin_bn(self.lk_origin(x))
        for k, r in self.dilated:
            conv, norm = (self.get_submodule(f"dil_{kind}_k{k}_{r}") for kind in ("conv", "bn"))
            out = out + norm(conv(x))
        return out


class SmallDepthwise(Reparameterizable):
    """A small depthwise kernel, `weight`, without a norm of its own."""

    deploy_name = ""

    def __init__(self, channels: int, kernel_size: int) -> None:
        pad = kernel_size // 2
        super().__init__(Geometry(channels, channels, kernel_size, 1, pad, groups=channels))
        self.weight = nn.Parameter(self.geometry.conv(bias=False).weight.detach())

    def branches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same; the norm of the block around it is folded in too."""
        g = self.geometry
        return F.conv2d(x, self.weight, None, 1, g.padding, 1, g.groups)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, section 3); `pwconv2` adds its shift.

    (N, C, H, W) -> the same. The shift `beta` is stored here, as in the official keys.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """`x * (1 + gamma * r)`, r being a channel's L2 norm over the mean of all channels'."""
        length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        relative = length / (length.mean(1, keepdim=True) + 1e-6)
        out: Tensor = (self.gamma.reshape(1, -1, 1, 1) * relative + 1) * x
        return out


class PointwiseLinear(nn.Linear):
    """A linear layer over the channels of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features, H, W) -> (N, out_features, H, W)."""
        return F.conv2d(x, self.weight.unsqueeze(2).unsqueeze(3), self.bias)


class Projection(Reparameterizable):
    """The second half of the perceptron: a linear map, `0`, and a batch norm, `2`."""

    deploy_name = "0"

    def __init__(self, inner: int, channels: int) -> None:
        super().__init__(Geometry(inner, channels, 1))
        self.add_module("0", PointwiseLinear(inner, channels, bias=False))
        self.add_module("2", nn.BatchNorm2d(channels))

    def deploy_layer(self) -> nn.Module:
        """A PointwiseLinear with bias, which also takes up the block's shift and scale."""
        return PointwiseLinear(self.geometry.in_channels, self.geometry.out_channels)

    def branches(self, x: Tensor) -> Tensor:
        """The linear map, then the norm: (N, inner, H, W) -> (N, C, H, W)."""
        out: Tensor = self.get_submodule("2")(self.get_submodule("0")(x))
        return out


class UniRepLKNetBlock(nn.Module):
    """A depthwise block, squeeze-and-excitation and a perceptron with response norm; residual.

    The norm after the depthwise block, and shift and scale around the projection, are stored here.
    The deploy layers take them over.
    """

    absorbed = ("norm", "act.1.beta", "gamma")

    def __init__(self, channels: int, kernel_size: int, ffn_ratio: int) -> None:
        super().__init__()
        self.dwconv = (
            DilatedReparamBlock(channels, kernel_size)
            if kernel_size >= 7
            else SmallDepthwise(channels, kernel_size)
        )
        self.norm: nn.BatchNorm2d | None = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels, channels // 4)
        inner = channels * ffn_ratio
        self.pwconv1 = nn.Sequential()
        self.pwconv1.add_module("1", PointwiseLinear(channels, inner))
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(inner))
        self.pwconv2 = Projection(inner, channels)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, in training and in deploy form: what was absorbed is None."""
        y = self.dwconv(x)
        if self.norm is not None:
            y = self.norm(y)
        y = self.act(self.pwconv1(self.se(y)))
        response = self.act.get_submodule("1")
        assert isinstance(response, ResponseNorm)
        if response.beta is not None:
            y = y + response.beta.reshape(1, -1, 1, 1)
        y = self.pwconv2(y)
        out: Tensor = x + (y if self.gamma is None else y * self.gamma.reshape(1, -1, 1, 1))
        return out


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same: each position is normed over its own channels."""
        last = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(last, (last.shape[3],), self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)


def default_kernels(num_blocks: Sequence[int]) -> list[list[int]]:
    """The published kernel sizes: small in stage 0; in a deep stage 2, large ones at intervals."""
    period = {18: 2, 27: 3}.get(num_blocks[2] if len(num_blocks) > 2 else 0, 1)
    return [
        [13 if index and (index != 2 or place % period == 0) else 3 for place in range(depth)]
        for index, depth in enumerate(num_blocks)
    ]


class UniRepLKNet(nn.Module):
    """Strided convolutions with layer norm, stages of blocks, a classifier.

    (N, in_channels, H, W) -> (N, num_classes). `kernel_sizes[i][j]` is the depthwise kernel of
    block j in stage i: from 7 on a dilated re-parameterized block, below a plain one.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        ffn_ratio: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        kernel_sizes = kernel_sizes or default_kernels(num_blocks)
        first = widths[0]
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(in_channels, first // 2, 3, 2, 1),
                    ChannelNorm(first // 2),
                    nn.GELU(),
                    nn.Conv2d(first // 2, first, 3, 2, 1),
                    ChannelNorm(first),
                )
            ]
        )
        for inner, outer in pairwise(widths):
            step = nn.Sequential(nn.Conv2d(inner, outer, 3, 2, 1), ChannelNorm(outer))
            self.downsample_layers.append(step)
        self.stages = nn.ModuleList(
            nn.Sequential(*(UniRepLKNetBlock(width, kernel, ffn_ratio) for kernel in kernels))
            for width, kernels in zip(widths, kernel_sizes, strict=True)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); the first stage sees H and W over 4, each later halves them."""
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        logits: Tensor = self.head(self.norm(x.mean((2, 3))))
        return logits


def _published(depths: Sequence[int], first: int) -> Values:
    return {"num_blocks": list(depths), "widths": [first * 2**i for i in range(4)]}


UNIREPLKNET: Mapping[str, Values] = {
    "UniRepLKNet-A": _published((2, 2, 6, 2), 40),
    "UniRepLKNet-F": _published((2, 2, 6, 2), 48),
    "UniRepLKNet-P": _published((2, 2, 6, 2), 64),
    "UniRepLKNet-N": _published((2, 2, 8, 2), 80),
    "UniRepLKNet-T": _published((3, 3, 18, 3), 80),
    "UniRepLKNet-S": _published((3, 3, 27, 3), 96),
    "UniRepLKNet-B": _published((3, 3, 27, 3), 128),
    "UniRepLKNet-L": _published((3, 3, 27, 3), 192),
    "UniRepLKNet-XL": _published((3, 3, 27, 3), 256),
}
"""The published networks (paper, table 3)."""


def _read(keys: Keys, hints: Values) -> Reading:
    stages = [keys.under(f"stages.{i}.") for i in range(keys.count("stages."))]
    depths = [stage.count("") for stage in stages]
    depthwise = ("lk_origin.weight", "weight")
    kernels = [
        [stage.under(f"{place}.dwconv.").shape(*depthwise)[2] for place in range(depth)]
        for stage, depth in zip(stages, depths, strict=True)
    ]
    widths = [stage.under("0.se.up.").width() for stage in stages]
    inner = stages[0].shape("0.pwconv1.1.weight", rank=2)[0] if stages else 0
    classes = keys.shape("head.weight", rank=2)[0]
    values: Values = {
        "num_blocks": depths,
        "widths": widths,
        "kernel_sizes": unless_default(default_kernels(depths), kernels),
        "ffn_ratio": ratio(inner, widths[0]) if widths else 4,
        "in_channels": keys.shape("downsample_layers.0.0.weight")[1],
        "num_classes": classes,
    }
    evidence = (
        f"The stages hold {depths} blocks of {widths} channels.",
        f"Their depthwise kernels are {kernels}; dilations stand in the keys.",
        f"`head.weight` has {classes} rows, one a class.",
    )
    assumed = ("The activation is taken to be GELU, batch norm's eps 1e-5 and layer norm's 1e-6.",)
    return Reading(values, evidence, assumed)


def _read_block(keys: Keys, hints: Values) -> Reading:
    channels, _, size, _ = keys.shape("lk_origin.weight")
    found = (re.match(r"dil_conv_k([0-9]{1,2})_([0-9]{1,2})\.weight$", key) for key in keys.shapes)
    dilated = [[int(match[1]), int(match[2])] for match in found if match]
    values: Values = {"channels": channels, "kernel_size": size}
    if dilated:
        values["dilated"] = dilated
    evidence = f"`lk_origin.weight` is {show(keys.shape('lk_origin.weight'))} beside {dilated}."
    assumed = "`eps` of batch norm is taken to be 1e-5, as in the repository."
    return Reading(values, (evidence,), (assumed,))


ROWS = (
    Family(
        family="unireplknet",
        network="UniRepLKNet",
        signature=re.compile(r"^stages\.[0-9]+\.[0-9]+\.(dwconv|pwconv[12])\."),
        read=_read,
        make=UniRepLKNet,
        named=UNIREPLKNET,
    ),
    Family(
        family="unireplknet",
        network="DilatedReparamBlock",
        signature=re.compile(r"^(lk_origin|origin_bn|dil_(conv|bn)_k[0-9]+_[0-9]+)\."),
        read=_read_block,
        make=DilatedReparamBlock,
        size=32,
    ),
)
