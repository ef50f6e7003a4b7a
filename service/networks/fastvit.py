"""FastViT (Vasu et al., ICCV 2023) with the keys of apple/ml-fastvit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNorm
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys
from service.networks.mobileone import MobileOneBlock
from service.networks.replknet import LargeKernelConv


class RepMixer(Reparameterizable):
    """Token mixing by `x + scale * (mixer(x) - norm(x))`, all of it linear (paper, equation 2)."""

    deploy_name = "reparam_conv"

    def __init__(
        self, channels: int, kernel_size: int = 3, *, layer_scale: bool = True, eps: float = 1e-5
    ) -> None:
        pad = kernel_size // 2
        super().__init__(Geometry(channels, channels, kernel_size, 1, pad, groups=channels))
        io = (channels, channels, kernel_size)
        self.norm = MobileOneBlock(
            *io, groups=channels, conv_branches=0, scale=False, act=None, eps=eps
        )
        self.mixer = MobileOneBlock(*io, groups=channels, act=None, eps=eps)
        if layer_scale:
            self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.scaled = layer_scale

    def branches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same; without a layer scale the factor is 1."""
        mixed: Tensor = self.mixer(x) - self.norm(x)
        return x + self.layer_scale * mixed if self.scaled else x + mixed


class RepCPE(Reparameterizable):
    """Conditional position encoding: a depthwise convolution added to its input."""

    deploy_name = "reparam_conv"

    def __init__(self, channels: int, kernel_size: int = 7) -> None:
        pad = kernel_size // 2
        super().__init__(Geometry(channels, channels, kernel_size, 1, pad, groups=channels))
        self.pe = self.geometry.conv(bias=True)

    def branches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same: the depthwise convolution with bias, plus `x`."""
        out: Tensor = self.pe(x)
        return out + x


class ConvFFN(nn.Module):
    """A 7x7 depthwise convolution with batch norm and a two-layer perceptron over channels."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = ConvNorm(Geometry(channels, channels, 7, padding=3, groups=channels))
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, by way of `hidden` channels, without a residual of its own."""
        out: Tensor = self.fc2(self.act(self.fc1(self.conv(x))))
        return out


class RepMixerBlock(nn.Module):
    """RepMixer, then ConvFFN as a scaled residual."""

    def __init__(self, channels: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        self.token_mixer = RepMixer(channels, kernel_size)
        self.convffn = ConvFFN(channels, hidden)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same; the token mixer has its residual inside."""
        x = self.token_mixer(x)
        out: Tensor = x + self.layer_scale * self.convffn(x)
        return out


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, heads 32 wide."""

    def __init__(self, channels: int, head: int = 32) -> None:
        super().__init__()
        self.heads, self.head = channels // head, head
        self.qkv = nn.Linear(channels, channels * 3, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same; each position attends to all H * W of its image."""
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        parts = self.qkv(tokens).reshape(batch, height * width, 3, self.heads, self.head)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(query * self.head**-0.5 @ key.transpose(2, 3), -1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, height * width, channels)
        out: Tensor = self.proj(mixed)
        return out.transpose(1, 2).reshape(batch, channels, height, width)


class AttentionBlock(nn.Module):
    """Attention after batch norm, then ConvFFN, both as scaled residuals."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.token_mixer = Attention(channels)
        self.convffn = ConvFFN(channels, hidden)
        self.layer_scale_1 = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same; only the attention has a norm before it."""
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        out: Tensor = x + self.layer_scale_2 * self.convffn(x)
        return out


class PatchEmbed(nn.Module):
    """Downsampling by a large depthwise kernel and a 1x1 block."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LargeKernelConv(in_channels, out_channels, kernel_size, 2, in_channels, small_kernel=3),
            MobileOneBlock(out_channels, out_channels, 1, act="gelu"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) -> (N, out, H / 2, W / 2), halves rounded up."""
        out: Tensor = self.proj(x)
        return out


class FastViT(nn.Module):
    """A convolutional stem, stages of RepMixer or attention blocks, and a classifier.

    (N, in_channels, H, W) -> (N, num_classes). `hidden[i]` is the inner width of stage i's
    perceptrons; `attention[i]` makes it a stage of attention, `positions[i]` puts a position
    encoding before it. `network` holds encodings, stages and downsamplings in order.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        hidden: Sequence[int],
        attention: Sequence[bool] | None = None,
        positions: Sequence[bool] | None = None,
        mixer_kernel: int = 3,
        down_kernel: int = 7,
        head_width: int | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        attention = attention or [False] * len(num_blocks)
        positions = positions or [False] * len(num_blocks)
        first, last = widths[0], widths[-1]
        self.patch_embed = nn.Sequential(
            MobileOneBlock(in_channels, first, 3, 2, act="gelu"),
            MobileOneBlock(first, first, 3, 2, groups=first, act="gelu"),
            MobileOneBlock(first, first, 1, act="gelu"),
        )
        layers: list[nn.Module] = []
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            if positions[index]:
                layers.append(RepCPE(width))
            make = (
                (lambda w, h: AttentionBlock(w, h))
                if attention[index]
                else (lambda w, h: RepMixerBlock(w, h, mixer_kernel))
            )
            layers.append(nn.Sequential(*(make(width, hidden[index]) for _ in range(depth))))
            if index + 1 < len(num_blocks):
                layers.append(PatchEmbed(width, widths[index + 1], down_kernel))
        self.network = nn.Sequential(*layers)
        wide = head_width or 2 * last
        self.conv_exp = MobileOneBlock(last, wide, 3, groups=last, se=wide // 16, act="gelu")
        self.head = nn.Linear(wide, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); the stem divides H and W by 4, each downsampling by 2."""
        x = self.conv_exp(self.network(self.patch_embed(x)))
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _published(depths: Sequence[int], first: int, ratio: int, attends: bool) -> Values:
    widths = [first * 2**i for i in range(4)]
    last = [False, False, False, True] if attends else None
    return {
        "num_blocks": list(depths),
        "widths": widths,
        "hidden": [width * ratio for width in widths],
        "attention": last,
        "positions": last,
    }


FASTVIT: Mapping[str, Values] = {
    "FastViT-T8": _published((2, 2, 4, 2), 48, 3, False),
    "FastViT-T12": _published((2, 2, 6, 2), 64, 3, False),
    "FastViT-S12": _published((2, 2, 6, 2), 64, 4, False),
    "FastViT-SA12": _published((2, 2, 6, 2), 64, 4, True),
    "FastViT-SA24": _published((4, 4, 12, 4), 64, 4, True),
    "FastViT-SA36": _published((6, 6, 18, 6), 64, 4, True),
    "FastViT-MA36": _published((6, 6, 18, 6), 76, 4, True),
}
"""The published networks (paper, table 2)."""


def _read(keys: Keys, hints: Values) -> Reading:
    depths, widths, hidden, attention, positions = [], [], [], [], []
    mixer_kernel, down_kernel, position = 3, 7, False
    for index in range(keys.count("network.")):
        layer = keys.under(f"network.{index}.")
        if layer.any("pe.") or layer.any("reparam_conv."):
            position = True
        elif layer.any("proj."):
            large = ("proj.0.lkb_origin.conv.weight", "proj.0.lkb_reparam.weight")
            down_kernel = layer.shape(*large)[2]
        else:
            depths.append(layer.count(""))
            widths.append(layer.under("0.convffn.conv.").width())
            hidden.append(layer.shape("0.convffn.fc1.bias", rank=1)[0])
            attention.append(layer.any("0.token_mixer.qkv."))
            positions.append(position)
            position = False
            if not attention[-1]:
                mixer = layer.under("0.token_mixer.")
                kernels = ("mixer.rbr_conv.0.conv.weight", "reparam_conv.weight")
                mixer_kernel = mixer.shape(*kernels)[2]
    stem = keys.under("patch_embed.0.").shape("rbr_conv.0.conv.weight", "reparam_conv.weight")
    classes, wide = keys.shape("head.weight", rank=2)
    twice = 2 * widths[-1] if widths else 0
    values: Values = {
        "num_blocks": depths,
        "widths": widths,
        "hidden": hidden,
        "attention": attention if any(attention) else None,
        "positions": positions if any(positions) else None,
        "mixer_kernel": mixer_kernel,
        "down_kernel": down_kernel,
        "head_width": None if wide == twice else wide,
        "in_channels": stem[1],
        "num_classes": classes,
    }
    evidence = (
        f"`network` holds stages of {depths} blocks of {widths} channels.",
        f"Their perceptrons are {hidden} wide inside; attention: {attention}.",
        f"`head.weight` has {classes} rows, one a class.",
    )
    assumed = (
        "Attention heads are taken to be 32 wide, and strides those of the repository.",
        "No activation follows the large kernels: the official forward discards its own.",
        "The activation is taken to be GELU and batch norm's eps 1e-5, as in the repository.",
    )
    return Reading(values, evidence, assumed)


def _read_mixer(keys: Keys, hints: Values) -> Reading:
    shape = keys.shape("mixer.rbr_conv.0.conv.weight")
    values: Values = {
        "channels": shape[0],
        "kernel_size": shape[2],
        "layer_scale": "layer_scale" in keys,
    }
    told = "`norm` has an identity only; its kernel is the mixer's."
    return Reading(values, (f"`mixer` and `norm` stand beside each other. {told}",))


def _read_position(keys: Keys, hints: Values) -> Reading:
    shape = keys.shape("pe.weight")
    evidence = f"`pe.weight` is a {shape[2]}x{shape[3]} depthwise kernel added to its input."
    return Reading({"channels": shape[0], "kernel_size": shape[2]}, (evidence,))


ROWS = (
    Family(
        family="fastvit",
        network="FastViT",
        signature=re.compile(r"^(patch_embed\.[0-9]|network\.[0-9]+\.([0-9]+\.|proj\.))"),
        read=_read,
        make=FastViT,
        named=FASTVIT,
        size=256,
    ),
    Family(
        family="fastvit",
        network="RepMixer",
        signature=re.compile(r"^mixer\.rbr_"),
        read=_read_mixer,
        make=RepMixer,
        size=32,
    ),
    Family(
        family="fastvit",
        network="RepCPE",
        signature=re.compile(r"^pe\.(weight|bias)$"),
        read=_read_position,
        make=RepCPE,
        size=32,
    ),
)
