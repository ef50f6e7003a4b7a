"""GoogLeNet with batch norm (Szegedy et al., CVPR 2015), with torchvision's keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry
from service.networks.blocks import ConvBN
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys

EPS = 1e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def unit(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> ConvBN:
    """A convolution with batch norm and ReLU."""
    geometry = Geometry(in_channels, out_channels, kernel, stride, kernel // 2)
    return ConvBN(geometry, act="relu", eps=EPS)


class Inception(nn.Module):
    """Four branches side by side: 1x1; 1x1 then 3x3; 1x1 then KxK; pooling then 1x1 (figure 2b).

    (N, C, H, W) -> (N, sum of the branches' channels, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        one: int,
        three: Sequence[int],
        large: Sequence[int],
        pooled: int,
        kernel: int,
    ) -> None:
        super().__init__()
        self.branch1 = unit(in_channels, one, 1)
        self.branch2 = nn.Sequential(unit(in_channels, three[0], 1), unit(three[0], three[1], 3))
        self.branch3 = nn.Sequential(
            unit(in_channels, large[0], 1), unit(large[0], large[1], kernel)
        )
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), unit(in_channels, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The branches' channels in their order: 1x1, 3x3, KxK, pooled."""
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


PLACES = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
PUBLISHED: Mapping[str, tuple[int, int, int, int, int, int]] = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
"""Channels of 1x1; 3x3 reduce, 3x3; large reduce, large; pooled (paper, table 1)."""


class GoogLeNet(nn.Module):
    """GoogLeNet's main path; its auxiliary classifiers serve training only and are not built.

    (N, 3, H, W) -> (N, num_classes). `channels[i]` are the six numbers of the i-th module, as in
    PUBLISHED. `large_kernel` is 5 in the paper and 3 in torchvision. `transform_input` undoes
    ImageNet's normalisation in favour of 0.5, as torchvision does for its published weights.
    """

    def __init__(
        self,
        channels: Sequence[Sequence[int]] = tuple(PUBLISHED.values()),
        stem: Sequence[int] = (64, 64, 192),
        large_kernel: int = 3,
        transform_input: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.transform_input = transform_input
        self.conv1 = unit(in_channels, stem[0], 7, 2)
        self.conv2 = unit(stem[0], stem[1], 1)
        self.conv3 = unit(stem[1], stem[2], 3)
        width = stem[2]
        for place, (one, reduce, three, squeeze, large, pooled) in zip(
            PLACES, channels, strict=True
        ):
            module = Inception(width, one, (reduce, three), (squeeze, large), pooled, large_kernel)
            self.add_module(f"inception{place}", module)
            width = one + three + large + pooled
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); with `transform_input`, `x` must have three channels."""
        if self.transform_input:
            # Python numbers keep float64 exact where a float32 buffer would not.
            x = torch.cat(
                [
                    x[:, i : i + 1] * (std / 0.5) + (mean - 0.5) / 0.5
                    for i, (mean, std) in enumerate(zip(MEAN, STD, strict=True))
                ],
                1,
            )
        x = F.max_pool2d(self.conv1(x), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.conv3(self.conv2(x)), 3, 2, ceil_mode=True)
        for place in PLACES:
            if place == "4a":
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            if place == "5a":
                x = F.max_pool2d(x, 2, 2, ceil_mode=True)
            x = self.get_submodule(f"inception{place}")(x)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _read(keys: Keys, hints: Values) -> Reading:
    rows, kernel = [], 3
    for place in PLACES:
        module = keys.under(f"inception{place}.")
        layers = ("branch1.", "branch2.0.", "branch2.1.", "branch3.0.", "branch3.1.", "branch4.1.")
        rows.append([module.shape(f"{layer}conv.weight")[0] for layer in layers])
        kernel = module.shape("branch3.1.conv.weight")[2]
    classes = keys.shape("fc.weight", rank=2)[0]
    first = keys.shape("conv1.conv.weight")
    values: Values = {
        "channels": rows,
        "stem": [keys.shape(f"conv{i}.conv.weight")[0] for i in (1, 2, 3)],
        "large_kernel": kernel,
        "in_channels": first[1],
        "num_classes": classes,
    }
    evidence = (
        f"Nine `inception` modules; their third branch ends in {kernel}x{kernel}.",
        f"`fc.weight` has {classes} rows, one a class.",
    )
    assumed = (
        "`transform_input` is taken to be false; torchvision's published weights need true.",
        "Batch norm's eps is taken to be 1e-3 and the activation ReLU, as in torchvision.",
        "Auxiliary classifiers are left out: only training uses them.",
    )
    return Reading(values, evidence, assumed)


ROWS = (
    Family(
        family="inception",
        network="GoogLeNet",
        signature=re.compile(r"^inception[345][a-e]\.branch[1-4]\."),
        read=_read,
        make=GoogLeNet,
        named={"GoogLeNet (Inception-V1)": {}},
        dropped=re.compile(r"^aux[12]\."),
    ),
)
