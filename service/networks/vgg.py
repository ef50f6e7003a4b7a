"""VGG-like networks in RepVGG's layout: a stem and stages of one kind of block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.family import Reading, Values
from service.networks.keys import Keys, ratio


class StagedVGG(nn.Module):
    """A stem block, stages of blocks, global average pooling and a linear classifier.

    (N, in_channels, H, W) -> (N, num_classes). `make(in, out, stride, groups)` gives a block;
    `widths[i]` and `num_blocks[i]` describe `stage{i+1}` and `strides[i]` is the stride of its
    first block, 2 by default. `groups` is one number, which then holds for every second layer as in
    the RepVGG paper, or one number a layer, stem included.
    """

    def __init__(
        self,
        make: Callable[[int, int, int, int], nn.Module],
        num_blocks: Sequence[int],
        widths: Sequence[int],
        stem_width: int,
        groups: int | Sequence[int],
        stem_stride: int,
        strides: Sequence[int] | None,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        if isinstance(groups, int):
            groups = alternate_groups(groups, 1 + sum(num_blocks))
        strides = strides or [2] * len(num_blocks)
        per_layer = iter(groups)
        channels = stem_width
        self.stage0 = make(in_channels, channels, stem_stride, next(per_layer))
        self.num_stages = len(num_blocks)
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = strides[index] if place == 0 else 1
                stage.append(make(channels, width, stride, next(per_layer)))
                channels = width
            self.add_module(f"stage{index + 1}", stage)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the last stage's channel means."""
        for index in range(self.num_stages + 1):
            x = self.get_submodule(f"stage{index}")(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


def alternate_groups(groups: int, layers: int) -> list[int]:
    """Groups of each layer when only layers 2, 4, 6, ... are grouped (RepVGG, section 4.1)."""
    return [groups if layer and layer % 2 == 0 else 1 for layer in range(layers)]


def read_staged(keys: Keys, kernels: Sequence[str], identity: str) -> Reading:
    """Read a StagedVGG whose blocks hold one of `kernels` and, where stride is 1, `identity`."""
    stages = keys.count("stage") - 1
    stem = keys.under("stage0.")
    channels = stem.width()
    depths, widths, groups, strides = [], [], [1], []
    for index in range(1, stages + 1):
        stage = keys.under(f"stage{index}.")
        depth, width = stage.count(""), stage.width()
        for place in range(depth):
            kernel = stage.under(f"{place}.").shape(*kernels)
            groups.append(ratio(width if place else channels, kernel[1]))
        strides.append(1 if stage.any(f"0.{identity}") else 2)
        depths.append(depth)
        widths.append(width)
        channels = width
    narrow = min(64, widths[0]) if widths else 0
    values: Values = {
        "num_blocks": depths,
        "widths": widths,
        "stem_width": unless_default(narrow, stem.width()),
        "groups": _compact(groups),
        "strides": unless_default([2] * stages, strides),
        "stem_stride": 1 if stem.any(identity) else 2,
        "in_channels": stem.shape(*kernels)[1],
        "num_classes": keys.shape("linear.weight", rank=2)[0],
    }
    evidence = (
        f"Stages 1 to {stages} hold {depths} blocks of {widths} channels.",
        f"Input channels over kernel width give the groups: {values['groups']}.",
        f"`linear.weight` has {values['num_classes']} rows, one a class.",
    )
    assumed = (
        "`strides` are 2 in the first block of each stage, unless it has an identity.",
        "`stem_stride` is taken to be 2.",
    )
    return Reading(values, evidence, assumed)


def unless_default(default: Any, value: Any) -> Any:
    """None, the constructor's way to say "as published", where `value` is the default."""
    return None if value == default else value


def _compact(groups: list[int]) -> int | list[int]:
    largest = max(groups)
    return largest if groups == alternate_groups(largest, len(groups)) else groups
