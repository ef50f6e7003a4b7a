"""QARepVGG (Chu et al., AAAI 2024): RepVGG that survives quantisation, with cxxgtxy's keys.

YOLOv6 has the same block with a wider eps, an optional average branch, and a deploy form that keeps
the last batch norm; `YoloQARepVGGBlock` is that one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNorm, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show
from service.networks.repvgg import REPVGG
from service.networks.vgg import StagedVGG, read_staged


class QARepVGGBlock(Reparameterizable):
    """3x3 with batch norm, a bare 1x1 and a bare identity, then a batch norm over the sum.

    `normed` is the paper's first version, in which 1x1 and identity have norms of their own.
    `avg_branch` adds 3x3 average pooling (YOLOv6's second version). Identity and pooling have no
    keys: by default there is an identity where shape and stride allow.
    """

    deploy_name = "rbr_reparam"
    tail: ClassVar[tuple[str, ...]] = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        *,
        identity: bool | None = None,
        avg_branch: bool = False,
        normed: bool = False,
        act: str | None = "relu",
        eps: float = 1e-5,
    ) -> None:
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, 3, stride, 1, groups=groups))
        if identity is None:
            identity = in_channels == out_channels and stride == 1
        self.identity = identity
        self.act = activation(act)
        self.rbr_identity = nn.BatchNorm2d(in_channels, eps=eps) if identity and normed else None
        self.rbr_dense = ConvNorm(self.geometry, eps)
        point = Geometry(*io, 1, stride, groups=groups)
        self.rbr_1x1 = ConvNorm(point, eps) if normed else point.conv(bias=False)
        self.rbr_avg = nn.AvgPool2d(3, stride, 1) if avg_branch else None
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def total(self, x: Tensor) -> Tensor:
        """The branches, added."""
        out: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.identity:
            out = out + (x if self.rbr_identity is None else self.rbr_identity(x))
        return out if self.rbr_avg is None else out + self.rbr_avg(x)

    def branches(self, x: Tensor) -> Tensor:
        """`total` under the last norm, which the deploy layer takes up."""
        out: Tensor = self.bn(self.total(x))
        return out


class YoloQARepVGGBlock(QARepVGGBlock):
    """The same, whose official deploy form keeps the last batch norm beside the folded kernel."""

    tail: ClassVar[tuple[str, ...]] = ("bn", "act")

    def branches(self, x: Tensor) -> Tensor:
        """`total` alone: the last norm belongs to the tail here."""
        return self.total(x)


class QARepVGG(StagedVGG):
    """`StagedVGG` of QARepVGG blocks."""

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        stem_width: int | None = None,
        groups: int | Sequence[int] = 1,
        stem_stride: int = 2,
        strides: Sequence[int] | None = None,
        normed: bool = False,
        in_channels: int = 3,
        num_classes: int = 1000,
        eps: float = 1e-5,
    ) -> None:
        def block(inner: int, outer: int, stride: int, layer_groups: int) -> nn.Module:
            return QARepVGGBlock(inner, outer, stride, layer_groups, normed=normed, eps=eps)

        stem = stem_width or min(64, widths[0])
        super().__init__(
            block, num_blocks, widths, stem, groups, stem_stride, strides, in_channels, num_classes
        )


_KERNELS = ("rbr_dense.conv.weight", "rbr_reparam.weight")
_ACT = "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository."


def _read_network(keys: Keys, hints: Values) -> Reading:
    reading = read_staged(keys, _KERNELS, "rbr_identity.")
    normed = keys.any("stage0.rbr_1x1.conv.")
    # Identities without keys stand wherever the stride is 1, as in RepVGG.
    values = {**reading.values, "normed": normed}
    told = "`bn` follows the sum of the branches" + (
        ", which have norms of their own." if normed else "; the 1x1 branch has none."
    )
    return Reading(values, (told, *reading.evidence), (*reading.assumed, _ACT))


def _read_block(eps: str, keys: Keys, hints: Values) -> Reading:
    out, inner, *_ = keys.shape(*_KERNELS)
    groups = hints.get("groups") or ratio(hints.get("in_channels", inner), inner)
    normed = keys.any("rbr_1x1.conv.")
    values: Values = {
        "in_channels": inner * groups,
        "out_channels": out,
        "groups": groups,
        "normed": normed,
    }
    evidence = f"`rbr_dense.conv.weight` is {show((out, inner, 3, 3))}; `bn` follows the sum."
    assumed = (
        "`stride` is taken to be 1, which the keys do not tell.",
        "`identity` is taken to exist where shape and stride allow; it has no keys.",
        "`avg_branch` is taken not to exist; it has no keys.",
        f"`groups` is taken to be {groups}, which the keys do not tell.",
        f"`act` is taken to be ReLU and batch norm's eps {eps}, as in the repository.",
    )
    return Reading(values, (evidence,), assumed)


def _block_row(network: str, signature: str, make: Callable[..., nn.Module], eps: str) -> Family:
    read = partial(_read_block, eps)
    return Family("qarepvgg", network, re.compile(signature), read, make, size=32)


ROWS = (
    Family(
        family="qarepvgg",
        network="QARepVGG",
        signature=re.compile(r"^(stage0|stage[0-9]+\.[0-9]+)\.(rbr_1x1\.weight$|bn\.running_)"),
        read=_read_network,
        make=QARepVGG,
        named={f"QA{name}": values for name, values in REPVGG.items() if "se_ratio" not in values},
    ),
    _block_row("QARepVGGBlock", r"^rbr_1x1\.weight$", QARepVGGBlock, "1e-5"),
    _block_row("YOLOv6-QARepVGGBlock", r"^$", partial(YoloQARepVGGBlock, eps=1e-3), "1e-3"),
)
