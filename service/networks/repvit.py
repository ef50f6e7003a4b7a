"""RepViT (Wang et al., CVPR 2024) with the keys of THU-MIG/RepViT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNormInPlace, NormLinear, Residual, SqueezeExcite
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys
from service.networks.repghost import divisible


def pair(geometry: Geometry, eps: float = 1e-5) -> ConvNormInPlace:
    """A convolution `c` and a batch norm `bn`, which fold into the pair's own place."""
    return ConvNormInPlace(geometry, eps, ("c", "bn"))


class RepVGGDW(Reparameterizable):
    """Depthwise 3x3 with norm, depthwise 1x1 and a bare identity; a norm over the sum.

    `legacy` is timm's older form: the 1x1 has a norm of its own and nothing follows the sum.
    """

    deploy_name = ""

    def __init__(self, channels: int, *, legacy: bool = False, eps: float = 1e-5) -> None:
        super().__init__(Geometry(channels, channels, 3, 1, 1, groups=channels))
        point = Geometry(channels, channels, 1, groups=channels)
        self.conv = pair(self.geometry, eps)
        self.conv1 = pair(point, eps) if legacy else point.conv(bias=True)
        self.bn = None if legacy else nn.BatchNorm2d(channels, eps=eps)

    def branches(self, x: Tensor) -> Tensor:
        """The last norm over both convolutions plus `x`; in the `legacy` form the sum alone."""
        out: Tensor = self.conv(x) + self.conv1(x) + x
        return out if self.bn is None else self.bn(out)


class Classifier(Reparameterizable):
    """One normed linear head, or the mean of two where the network was distilled."""

    deploy_name = ""

    def __init__(self, channels: int, num_classes: int, distilled: bool) -> None:
        super().__init__(Geometry(channels, num_classes, 1))
        self.classifier = NormLinear(channels, num_classes)
        self.classifier_dist = NormLinear(channels, num_classes) if distilled else None

    def deploy_layer(self) -> nn.Module:
        """One linear layer with bias, also for two distilled heads."""
        return nn.Linear(self.geometry.in_channels, self.geometry.out_channels)

    def branches(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, num_classes): the head's logits, or the mean of both heads'."""
        out: Tensor = self.classifier(x)
        return out if self.classifier_dist is None else (out + self.classifier_dist(x)) / 2


class RepViTBlock(nn.Module):
    """A token mixer, which may halve the resolution, and a channel mixer."""

    def __init__(self, inner: int, outer: int, stride: int, gate: int, legacy: bool) -> None:
        super().__init__()
        se = SqueezeExcite(inner, gate, ("fc1", "fc2")) if gate else nn.Identity()
        if stride == 1:
            self.token_mixer = nn.Sequential(RepVGGDW(inner, legacy=legacy), se)
        else:
            self.token_mixer = nn.Sequential(
                pair(Geometry(inner, inner, 3, stride, 1, groups=inner)),
                se,
                pair(Geometry(inner, outer, 1)),
            )
        self.channel_mixer = Residual(
            nn.Sequential(
                pair(Geometry(outer, 2 * outer, 1)),
                nn.GELU(),
                pair(Geometry(2 * outer, outer, 1)),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inner, H, W) -> (N, outer, H', W'); the stride divides the sides, rounded up."""
        out: Tensor = self.channel_mixer(self.token_mixer(x))
        return out


class RepViT(nn.Module):
    """A two-layer stem, blocks and a normed classifier.

    (N, in_channels, H, W) -> (N, num_classes). `blocks[i]` is (output channels, stride, inner
    channels of squeeze-and-excitation or 0) of `features.{i+1}`.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[int]],
        distilled: bool = False,
        legacy: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        channels = blocks[0][0]
        stem = nn.Sequential(
            pair(Geometry(in_channels, channels // 2, 3, 2, 1)),
            nn.GELU(),
            pair(Geometry(channels // 2, channels, 3, 2, 1)),
        )
        self.features = nn.Sequential(stem)
        for outer, stride, gate in blocks:
            self.features.append(RepViTBlock(channels, outer, stride, gate, legacy))
            channels = outer
        self.classifier = Classifier(channels, num_classes, distilled)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the channel means; the stem divides H and W by 4."""
        x = torch.flatten(F.adaptive_avg_pool2d(self.features(x), 1), 1)
        logits: Tensor = self.classifier(x)
        return logits


def _published(first: int, depths: Sequence[int]) -> Values:
    """`depths[i]` blocks of stride 1 in stage i; every second has a gate, a lonely last one not."""
    blocks = []
    for index, depth in enumerate(depths):
        width = first * 2**index
        if index:
            blocks.append([width, 2, 0])
        for place in range(depth):
            gated = place % 2 == 0 and (depth == 1 or place + 1 < depth)
            blocks.append([width, 1, divisible(width * 0.25, 8) if gated else 0])
    return {"blocks": blocks}


REPVIT: Mapping[str, Values] = {
    "RepViT-M0.6": _published(40, (2, 2, 9, 1)),
    "RepViT-M0.9": _published(48, (3, 3, 15, 2)),
    "RepViT-M1.0": _published(56, (3, 3, 15, 2)),
    "RepViT-M1.1": _published(64, (3, 3, 13, 2)),
    "RepViT-M1.5": _published(64, (5, 5, 25, 4)),
    "RepViT-M2.3": _published(80, (7, 7, 35, 2)),
}
"""The published networks (paper, table 1)."""


def _read(keys: Keys, hints: Values) -> Reading:
    features = [keys.under(f"features.{i}.") for i in range(keys.count("features."))]
    blocks, legacy = [], False
    for block in features[1:]:
        width = block.under("channel_mixer.m.2.").width()
        strided = block.any("token_mixer.2.")
        gate = 0
        if "token_mixer.1.fc1.bias" in block:
            gate = block.shape("token_mixer.1.fc1.bias", rank=1)[0]
        blocks.append([width, 2 if strided else 1, gate])
        legacy = legacy or block.any("token_mixer.0.conv1.bn.")
    heads = ("classifier.classifier.l.weight", "classifier.weight")
    classes = keys.shape(*heads, rank=2)[0]
    stem = keys.under("features.0.0.").shape("c.weight", "weight")
    values: Values = {
        "blocks": blocks,
        "distilled": keys.any("classifier.classifier_dist."),
        "legacy": legacy,
        "in_channels": stem[1],
        "num_classes": classes,
    }
    evidence = (
        f"`features` holds a stem and {len(blocks)} blocks, "
        f"{sum(row[1] == 2 for row in blocks)} of them strided.",
        f"`classifier` has {classes} classes" + (", twice." if values["distilled"] else "."),
    )
    assumed = (
        "Each token mixer is taken to add its input, which has no keys.",
        "The activation is taken to be GELU and batch norm's eps 1e-5, as in the repository.",
    )
    return Reading(values, evidence, assumed)


def _read_depthwise(keys: Keys, hints: Values) -> Reading:
    channels = keys.shape("conv.c.weight")[0]
    values: Values = {"channels": channels, "legacy": keys.any("conv1.bn.")}
    told = f"`conv.c` is a depthwise kernel over {channels} channels, beside `conv1`."
    assumed = "The input is taken to be added, which has no keys; batch norm's eps is 1e-5."
    return Reading(values, (told,), (assumed,))


def _read_head(keys: Keys, hints: Values) -> Reading:
    classes, channels = keys.shape("l.weight", rank=2)
    told = f"`bn` normalises {channels} features before `l`, which has {classes} rows."
    values: Values = {"channels": channels, "num_classes": classes}
    return Reading(values, (told,), ("`eps` of batch norm is taken to be 1e-5.",))


ROWS = (
    Family(
        family="repvit",
        network="RepViT",
        signature=re.compile(r"^features\.[0-9]+\.(token_mixer|channel_mixer)\."),
        read=_read,
        make=RepViT,
        named={
            **REPVIT,
            **{
                f"{name} (distilled)": {**values, "distilled": True}
                for name, values in REPVIT.items()
            },
        },
    ),
    Family(
        family="repvit",
        network="RepVGGDW",
        signature=re.compile(r"^conv\.c\."),
        whole=re.compile(r"^(conv|conv1|bn)\."),
        read=_read_depthwise,
        make=RepVGGDW,
        size=32,
    ),
    Family(
        family="repvit",
        network="BN_Linear",
        signature=re.compile(r"^l\.weight$"),
        whole=re.compile(r"^(bn|l)\."),
        read=_read_head,
        make=NormLinear,
        shape=(),
    ),
)
