"""EfficientViT (Liu et al., CVPR 2023) with timm's keys: cascaded group attention."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry
from service.networks.blocks import ConvNormInPlace, NormLinear, Residual, SqueezeExcite
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys
from service.networks.levit import PositionBias
from service.networks.repghost import divisible


def depthwise(channels: int, kernel: int, stride: int = 1) -> ConvNormInPlace:
    """A depthwise convolution with batch norm."""
    geometry = Geometry(channels, channels, kernel, stride, kernel // 2, groups=channels)
    return ConvNormInPlace(geometry)


def point(in_channels: int, out_channels: int) -> ConvNormInPlace:
    """A 1x1 convolution with batch norm."""
    return ConvNormInPlace(Geometry(in_channels, out_channels, 1))


class Perceptron(nn.Module):
    """Two 1x1 convolutions with ReLU between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pw1 = point(channels, 2 * channels)
        self.pw2 = point(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, by way of 2 C channels."""
        out: Tensor = self.pw2(F.relu(self.pw1(x)))
        return out


class CascadedGroupAttention(PositionBias):
    """Each head attends within its share of the channels and hands its result to the next."""

    def __init__(self, channels: int, key: int, kernels: Sequence[int], size: int) -> None:
        super().__init__()
        heads = len(kernels)
        self.value = channels // heads
        self.sizes = [key, key, self.value]
        self.qkvs = nn.ModuleList(point(channels // heads, 2 * key + self.value) for _ in kernels)
        self.dws = nn.ModuleList(depthwise(key, kernel) for kernel in kernels)
        self.proj = nn.Sequential(nn.ReLU(), point(self.value * heads, channels))
        self.add_biases(heads, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, size, size) -> the same; a head reads its share plus the result before it."""
        height, width = x.shape[2:]
        shares, biases = x.chunk(len(self.qkvs), 1), self.biases()
        outs: list[Tensor] = []
        for head, (qkv, dw) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            share = shares[head] + outs[-1] if outs else shares[head]
            query, key, value = qkv(share).split(self.sizes, 1)
            query, key, value = dw(query).flatten(2), key.flatten(2), value.flatten(2)
            weights = query.transpose(1, 2) @ key * self.sizes[0] ** -0.5 + biases[head]
            mixed = value @ torch.softmax(weights, -1).transpose(1, 2)
            outs.append(mixed.reshape(-1, self.value, height, width))
        out: Tensor = self.proj(torch.cat(outs, 1))
        return out


class WindowAttention(nn.Module):
    """`attn` in windows of at most `window` x `window` positions, zero-padded at the far edges."""

    def __init__(self, attn: nn.Module, window: int) -> None:
        super().__init__()
        self.attn = attn
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same; padding takes part in the last windows and is cut off again."""
        height, width = x.shape[2:]
        side = self.window
        if height <= side and width <= side:
            whole: Tensor = self.attn(x)
            return whole
        below, right = -height % side, -width % side
        x = F.pad(x, [0, right, 0, below])
        channels, rows, columns = x.shape[1], (height + below) // side, (width + right) // side
        parts = x.reshape(-1, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        parts = self.attn(parts.reshape(-1, channels, side, side))
        parts = parts.reshape(-1, rows, columns, channels, side, side).permute(0, 3, 1, 4, 2, 5)
        joined: Tensor = parts.reshape(-1, channels, rows * side, columns * side)
        return joined[:, :, :height, :width]


class Block(nn.Module):
    """Depthwise, perceptron, attention, depthwise, perceptron; each residual."""

    def __init__(self, channels: int, key: int, kernels: Sequence[int], window: int) -> None:
        super().__init__()
        attention = CascadedGroupAttention(channels, key, kernels, window)
        self.dw0 = Residual(depthwise(channels, 3))
        self.ffn0 = Residual(Perceptron(channels))
        self.mixer = Residual(WindowAttention(attention, window))
        self.dw1 = Residual(depthwise(channels, 3))
        self.ffn1 = Residual(Perceptron(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, through the five residual parts in turn."""
        out: Tensor = self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))
        return out


class PatchMerging(nn.Module):
    """An inverted bottleneck with stride 2 and squeeze-and-excitation."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.conv1 = point(channels, hidden)
        self.conv2 = depthwise(hidden, 3, 2)
        self.se = SqueezeExcite(hidden, divisible(hidden * 0.25, 8), ("fc1", "fc2"))
        self.conv3 = point(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H / 2, W / 2), halves rounded up."""
        inner = F.relu(self.conv2(F.relu(self.conv1(x))))
        out: Tensor = self.conv3(self.se(inner))
        return out


def _mixing(channels: int) -> nn.Sequential:
    return nn.Sequential(Residual(depthwise(channels, 3)), Residual(Perceptron(channels)))


class Stage(nn.Module):
    """A downsampling, absent in the first stage, and blocks."""

    def __init__(self, in_channels: int, channels: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if in_channels:
            self.downsample = nn.Sequential(
                OrderedDict(
                    res1=_mixing(in_channels),
                    patchmerge=PatchMerging(in_channels, channels),
                    res2=_mixing(channels),
                )
            )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks over the downsampled map, its sides halved, or over `x` itself."""
        out: Tensor = self.blocks(self.downsample(x))
        return out


class EfficientViT(nn.Module):
    """Four strided convolutions, stages of blocks, the mean and a normed linear head.

    (N, in_channels, H, W) -> (N, num_classes). `heads[i]` attend in stage i, `windows[i]` is the
    side of its windows, `kernels[j]` the depthwise kernel on the queries of head j.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        heads: Sequence[int],
        kernels: Sequence[int],
        windows: Sequence[int] = (7, 7, 4),
        key: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential()
        channels = in_channels
        for index in range(4):
            width = widths[0] // 2 ** (3 - index)
            layer = ConvNormInPlace(Geometry(channels, width, 3, 2, 1))
            self.patch_embed.add_module(f"conv{index + 1}", layer)
            if index < 3:
                self.patch_embed.add_module(f"relu{index + 1}", nn.ReLU())
            channels = width
        self.stages = nn.Sequential()
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            own = kernels[: heads[index]]
            blocks = [Block(width, key, own, windows[index]) for _ in range(depth)]
            self.stages.append(Stage(channels if index else 0, width, blocks))
            channels = width
        self.head = NormLinear(channels, num_classes, linear="linear")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); the first stage sees sides divided by 16, rounded up."""
        x = self.stages(self.patch_embed(x))
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _published(
    depths: Sequence[int], widths: Sequence[int], heads: Sequence[int], kernels: Sequence[int]
) -> Values:
    return {
        "num_blocks": list(depths),
        "widths": list(widths),
        "heads": list(heads),
        "kernels": list(kernels[: max(heads)]),
    }


_MIXED = (7, 5, 3, 3)
EFFICIENTVIT: Mapping[str, Values] = {
    "EfficientViT-M0": _published((1, 2, 3), (64, 128, 192), (4, 4, 4), (5, 5, 5, 5)),
    "EfficientViT-M1": _published((1, 2, 3), (128, 144, 192), (2, 3, 3), _MIXED),
    "EfficientViT-M2": _published((1, 2, 3), (128, 192, 224), (4, 3, 2), _MIXED),
    "EfficientViT-M3": _published((1, 2, 3), (128, 240, 320), (4, 3, 4), (5, 5, 5, 5)),
    "EfficientViT-M4": _published((1, 2, 3), (128, 256, 384), (4, 4, 4), _MIXED),
    "EfficientViT-M5": _published((1, 3, 4), (192, 288, 384), (3, 3, 4), _MIXED),
}
"""The published networks (paper, table 1)."""


def _read(keys: Keys, hints: Values) -> Reading:
    stages = [keys.under(f"stages.{i}.") for i in range(keys.count("stages."))]
    attention = [stage.under("blocks.0.mixer.m.attn.") for stage in stages]
    depths = [stage.count("blocks.") for stage in stages]
    widths = [stage.under("blocks.0.ffn0.m.pw2.").width() for stage in stages]
    biases = [part.shape("attention_biases", rank=2) for part in attention]
    heads = [shape[0] for shape in biases]
    kernel = ("conv.weight", "weight")
    widest = attention[heads.index(max(heads))]
    queries = [widest.under(f"dws.{i}.").shape(*kernel) for i in range(max(heads))]
    classes = keys.under("head.").shape("linear.weight", "weight", rank=2)[0]
    values: Values = {
        "num_blocks": depths,
        "widths": widths,
        "heads": heads,
        "kernels": [shape[2] for shape in queries],
        "windows": [round(shape[1] ** 0.5) for shape in biases],
        "key": queries[0][0],
        "in_channels": keys.under("patch_embed.conv1.").shape(*kernel)[1],
        "num_classes": classes,
    }
    evidence = (
        f"The stages hold {depths} blocks of {widths} channels and {heads} heads.",
        f"The position biases cover windows of {values['windows']} positions a side.",
    )
    assumed = "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository."
    return Reading(values, evidence, (assumed,))


ROWS = (
    Family(
        family="efficientvit",
        network="EfficientViT",
        signature=re.compile(r"^stages\.[0-9]+\.blocks\.[0-9]+\.mixer\.m\.attn\."),
        read=_read,
        make=EfficientViT,
        named=EFFICIENTVIT,
    ),
)
