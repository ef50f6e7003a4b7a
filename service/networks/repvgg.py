"""RepVGG (Ding et al., CVPR 2021) and RepVGGplus with the keys of DingXiaoH/RepVGG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNorm, SqueezeExcite, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show
from service.networks.vgg import StagedVGG, read_staged, unless_default


class RepVGGBlock(Reparameterizable):
    """A 3x3, a 1x1 and, where shape allows, an identity branch, each with its batch norm.

    Where `se` is not zero, squeeze-and-excitation with that many inner channels follows the sum
    *before* the activation (RepVGG-D2se); `post_se` puts it *after* (RepVGGplus).
    """

    deploy_name = "rbr_reparam"
    tail = ("se", "act", "post_se")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        se: int = 0,
        post_se: int = 0,
        act: str | None = "relu",
        identity: bool | None = None,
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2 if padding is None else padding
        shape = (in_channels, out_channels)
        super().__init__(Geometry(*shape, kernel_size, stride, pad, dilation, groups))
        self.act = activation(act)
        self.se = SqueezeExcite(out_channels, se) if se else nn.Identity()
        self.post_se = SqueezeExcite(out_channels, post_se) if post_se else nn.Identity()
        if identity is None:
            identity = in_channels == out_channels and stride == 1
        self.rbr_identity = nn.BatchNorm2d(in_channels, eps=eps) if identity else None
        self.rbr_dense = ConvNorm(self.geometry, eps)
        point = Geometry(*shape, 1, stride, pad - kernel_size // 2, groups=groups)
        self.rbr_1x1 = ConvNorm(point, eps)

    def branches(self, x: Tensor) -> Tensor:
        """The dense kernel, the 1x1 and, if there is one, the identity, each normed, added."""
        out: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
        return out if self.rbr_identity is None else out + self.rbr_identity(x)


class RepVGG(StagedVGG):
    """RepVGG: `StagedVGG` of RepVGG blocks, with squeeze-and-excitation where `se_ratio` says so.

    `se_ratio` is out_channels / inner channels of squeeze-and-excitation, 0 for none.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        stem_width: int | None = None,
        groups: int | Sequence[int] = 1,
        stem_stride: int = 2,
        strides: Sequence[int] | None = None,
        se_ratio: int = 0,
        in_channels: int = 3,
        num_classes: int = 1000,
        eps: float = 1e-5,
    ) -> None:
        def block(inner: int, outer: int, stride: int, layer_groups: int) -> RepVGGBlock:
            se = outer // se_ratio if se_ratio else 0
            return RepVGGBlock(inner, outer, stride=stride, groups=layer_groups, se=se, eps=eps)

        stem = stem_width or min(64, widths[0])
        super().__init__(
            block, num_blocks, widths, stem, groups, stem_stride, strides, in_channels, num_classes
        )


class PlusStage(nn.Module):
    """A run of RepVGGplus blocks under the key `blocks`."""

    def __init__(self, blocks: Sequence[RepVGGBlock]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """The blocks in turn, of which the first may have a stride of 2."""
        out: Tensor = self.blocks(x)
        return out


class RepVGGplus(nn.Module):
    """RepVGGplus: four stages, the third in two halves, squeeze-and-excitation after each ReLU.

    (N, in_channels, H, W) -> (N, num_classes): the main output. The official network also has
    three auxiliary classifiers, which only training uses and which are not built here.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        stem_width: int | None = None,
        post_se_ratio: int = 4,
        in_channels: int = 3,
        num_classes: int = 1000,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        stem = stem_width or min(64, widths[0])

        def block(inner: int, outer: int, stride: int) -> RepVGGBlock:
            se = outer // post_se_ratio if post_se_ratio else 0
            return RepVGGBlock(inner, outer, stride=stride, post_se=se, eps=eps)

        def stage(inner: int, outer: int, depth: int, stride: int) -> PlusStage:
            return PlusStage(
                [block(outer if i else inner, outer, 1 if i else stride) for i in range(depth)]
            )

        first, second, third, fourth = widths
        half = num_blocks[2] // 2
        self.stage0 = block(in_channels, stem, 2)
        self.stage1 = stage(stem, first, num_blocks[0], 2)
        self.stage2 = stage(first, second, num_blocks[1], 2)
        self.stage3_first = stage(second, third, half, 2)
        self.stage3_second = stage(third, third, num_blocks[2] - half, 1)
        self.stage4 = stage(third, fourth, num_blocks[3], 2)
        self.linear = nn.Linear(fourth, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of the main output; H and W are divided by 32, rounded up."""
        x = self.stage2(self.stage1(self.stage0(x)))
        x = self.stage4(self.stage3_second(self.stage3_first(x)))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits: Tensor = self.linear(x)
        return logits


def _published(depths: Sequence[int], multipliers: Sequence[float], **more: Any) -> dict[str, Any]:
    widths = [int(64 * 2**i * multiplier) for i, multiplier in enumerate(multipliers)]
    return {"num_blocks": list(depths), "widths": widths, **more}


_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)

REPVGG: Mapping[str, dict[str, Any]] = {
    "RepVGG-A0": _published(_A, (0.75, 0.75, 0.75, 2.5)),
    "RepVGG-A1": _published(_A, (1, 1, 1, 2.5)),
    "RepVGG-A2": _published(_A, (1.5, 1.5, 1.5, 2.75)),
    "RepVGG-B0": _published(_B, (1, 1, 1, 2.5)),
    "RepVGG-B1": _published(_B, (2, 2, 2, 4)),
    "RepVGG-B1g2": _published(_B, (2, 2, 2, 4), groups=2),
    "RepVGG-B1g4": _published(_B, (2, 2, 2, 4), groups=4),
    "RepVGG-B2": _published(_B, (2.5, 2.5, 2.5, 5)),
    "RepVGG-B2g2": _published(_B, (2.5, 2.5, 2.5, 5), groups=2),
    "RepVGG-B2g4": _published(_B, (2.5, 2.5, 2.5, 5), groups=4),
    "RepVGG-B3": _published(_B, (3, 3, 3, 5)),
    "RepVGG-B3g2": _published(_B, (3, 3, 3, 5), groups=2),
    "RepVGG-B3g4": _published(_B, (3, 3, 3, 5), groups=4),
    "RepVGG-D2se": _published(_D, (2.5, 2.5, 2.5, 5), se_ratio=16),
}
"""Every published RepVGG (paper, tables 2 and 3, and the repository for D2se)."""

REPVGGPLUS: Mapping[str, dict[str, Any]] = {
    "RepVGGplus-L2pse": _published(_D, (2.5, 2.5, 2.5, 5)),
}


_KERNELS = ("rbr_dense.conv.weight", "rbr_1x1.conv.weight", "rbr_reparam.weight")
_RELU = "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository."


def _read_block(keys: Keys, hints: Values) -> Reading:
    kernel = next((k for k in _KERNELS if k in keys), _KERNELS[0])
    out, inner, *_ = keys.shape(kernel)
    identity = keys.any("rbr_identity.")
    assumed = [_RELU]
    if identity:
        groups, told = ratio(out, inner), "rbr_identity exists, so input and output are as wide"
    elif "groups" in hints:
        groups, told = hints["groups"], "the config fixes the groups"
    else:
        groups, told = ratio(hints.get("in_channels", inner), inner), "no identity branch"
        assumed.append(f"`groups` is taken to be {groups}, which the keys do not tell.")
    values: Values = {"in_channels": inner * groups, "out_channels": out, "groups": groups}
    values["stride"] = 1 if identity else hints.get("stride", 2)
    if not identity:
        assumed.append("`stride` is taken to be 2, because there is no identity branch.")
    if not keys.any("rbr_reparam."):
        values["identity"] = identity
    for name in ("se", "post_se"):
        if f"{name}.down.bias" in keys:
            values[name] = keys.shape(f"{name}.down.bias", rank=1)[0]
    evidence = f"`{kernel}` is {show(keys.shape(kernel))} and {told}: a RepVGG block."
    return Reading(values, (evidence,), tuple(assumed))


def _read_network(keys: Keys, hints: Values) -> Reading:
    reading = read_staged(keys, _KERNELS, "rbr_identity.")
    stages = len(reading.values["num_blocks"])
    last = keys.under(f"stage{stages}.0." if stages else "stage0.")
    ratio_of_se = channels_over(last, "se")
    if not ratio_of_se:
        return replace(reading, assumed=(_RELU, *reading.assumed))
    told = "`se.down` exists: squeeze-and-excitation before the activation."
    values = {**reading.values, "se_ratio": ratio_of_se}
    return Reading(values, (*reading.evidence, told), (_RELU, *reading.assumed))


def _read_plus(keys: Keys, hints: Values) -> Reading:
    names = ("stage1", "stage2", "stage3_first", "stage3_second", "stage4")
    stages = [keys.under(f"{name}.blocks.") for name in names]
    depths = [stage.count("") for stage in stages]
    stem = keys.under("stage0.")
    widths = [stages[i].width() for i in (0, 1, 3, 4)]
    values: Values = {
        "num_blocks": [depths[0], depths[1], depths[2] + depths[3], depths[4]],
        "widths": widths,
        "stem_width": unless_default(min(64, widths[0]), stem.width()),
        "post_se_ratio": channels_over(stages[4].under("0."), "post_se"),
        "in_channels": stem.shape(*_KERNELS)[1],
        "num_classes": keys.shape("linear.weight", rank=2)[0],
    }
    evidence = (
        f"The stages hold {depths} blocks of {widths} channels; stage 3 comes in two halves.",
        f"`post_se` has 1/{values['post_se_ratio']} of the channels inside, after the activation.",
    )
    dropped = "Auxiliary classifiers are left out: only training uses them."
    return Reading(values, evidence, (_RELU, dropped))


def channels_over(block: Keys, gate: str) -> int:
    """Channels / inner channels of the squeeze-and-excitation named `gate`; 0 without one."""
    if not block.any(f"{gate}."):
        return 0
    inner, outer, *_ = block.shape(f"{gate}.down.weight")
    return outer // inner


_BRANCH = r"rbr_(dense\.(conv|bn)|1x1\.(conv|bn)|identity|reparam)\."

ROWS = (
    Family(
        family="repvgg",
        network="RepVGGplus",
        signature=re.compile(r"^stage[1-4](_first|_second)?\.blocks\.[0-9]+\." + _BRANCH),
        read=_read_plus,
        make=RepVGGplus,
        named=REPVGGPLUS,
        dropped=re.compile(r"^stage(1|2|3_first)_aux\."),
    ),
    Family(
        family="repvgg",
        network="RepVGG",
        signature=re.compile(r"^stage[0-9]+\.([0-9]+\.)?" + _BRANCH),
        read=_read_network,
        make=RepVGG,
        named=REPVGG,
    ),
    Family(
        family="repvgg",
        network="RepVGGBlock",
        signature=re.compile(r"^" + _BRANCH),
        read=_read_block,
        make=RepVGGBlock,
        size=32,
    ),
)
