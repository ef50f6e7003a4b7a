"""MobileNet-V1 (Howard et al., 2017) of the DBB repository, built of one kind of block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys
from service.networks.units import UNITS, Unit, UnitKind

WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class DepthwiseSeparable(nn.Module):
    """A 3x3 depthwise unit and a 1x1 unit, each followed by ReLU."""

    def __init__(self, unit: Unit, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        depthwise = Geometry(in_channels, in_channels, 3, stride, 1, groups=in_channels)
        self.depthwise = unit(depthwise, "relu")
        self.pointwise = unit(Geometry(in_channels, out_channels, 1), "relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H', W'); the stride divides the sides, rounded up."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class MobileNetV1(nn.Module):
    """A strided 3x3 unit, depthwise-separable blocks under `stem`, pooling and a classifier.

    (N, in_channels, H, W) -> (N, num_classes). `unit` is a key of `units.UNITS`.
    """

    def __init__(
        self,
        unit: str,
        stem_width: int = 32,
        widths: Sequence[int] = WIDTHS,
        strides: Sequence[int] | None = None,
        stem_stride: int = 2,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        make = UNITS[unit].make
        strides = strides or published_strides(len(widths))
        self.conv1 = make(Geometry(in_channels, stem_width, 3, stem_stride, 1), "relu")
        inputs = (stem_width, *widths)
        self.stem = nn.Sequential(
            *(
                DepthwiseSeparable(make, inner, outer, stride)
                for inner, outer, stride in zip(inputs, widths, strides, strict=False)
            )
        )
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the channel means behind `stem`."""
        x = self.stem(self.conv1(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


def published_strides(blocks: int) -> list[int]:
    """Strides of the first `blocks` published blocks; 1 beyond the thirteenth."""
    return [*STRIDES[:blocks], *[1] * (blocks - len(STRIDES))]


def _read(kind: UnitKind, keys: Keys, hints: Values) -> Reading:
    stem_width, in_channels, *_ = keys.under("conv1.").shape(*kind.kernels)
    blocks = keys.count("stem.")
    widths = [keys.under(f"stem.{index}.pointwise.").width() for index in range(blocks)]
    values: Values = {
        "stem_width": stem_width,
        "widths": widths,
        "in_channels": in_channels,
        "num_classes": keys.shape("linear.weight", rank=2)[0],
    }
    evidence = (
        f"`stem` holds {blocks} depthwise-separable blocks of {kind.title} units.",
        f"`linear.weight` has {values['num_classes']} rows, one a class.",
    )
    assumed = (
        "`strides` are the published ones, 2 in blocks 1, 3, 5 and 11.",
        "`stem_stride` is taken to be 2.",
        "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository.",
    )
    return Reading(values, evidence, assumed)


def _row(key: str, kind: UnitKind) -> Family:
    return Family(
        family=kind.family,
        network=f"{kind.title}-MobileNet",
        signature=re.compile(rf"^stem\.[0-9]+\.(depth|point)wise\.{kind.signature}"),
        read=partial(_read, kind),
        make=partial(MobileNetV1, key),
        named={f"{kind.title}-MobileNet": {}},
    )


ROWS = tuple(_row(key, kind) for key, kind in UNITS.items())
