"""ECBSR (Zhang et al., ACM MM 2021), super-resolution, with the keys of xindongzhang/ECBSR."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show

_SOBEL = ((1.0, 0.0, -1.0), (2.0, 0.0, -2.0), (1.0, 0.0, -1.0))
_LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class Stacked(nn.Module):
    """1x1 then 3x3. Between them the border is filled with the first bias, not with zero.

    So the first convolution's output is what it would be if its input were zero outside, and the
    two equal one padded convolution (paper, section 3.2).
    """

    def __init__(self, in_channels: int, inner: int) -> None:
        super().__init__()
        first = nn.Conv2d(in_channels, inner, 1)
        assert first.bias is not None
        self.k0, self.b0 = first.weight, first.bias

    def bordered(self, x: Tensor) -> Tensor:
        """(N, inner, H + 2, W + 2): the first convolution with its border."""
        border = self.b0.reshape(1, -1, 1, 1)
        return F.pad(F.conv2d(x, self.k0), [1] * 4) + border


class StackedDense(Stacked):
    """1x1 to a wider feature map, then a learned 3x3 kernel (`k1`, `b1`)."""

    def __init__(self, in_channels: int, inner: int, out_channels: int) -> None:
        super().__init__(in_channels, inner)
        second = nn.Conv2d(inner, out_channels, 3)
        assert second.bias is not None
        self.k1, self.b1 = second.weight, second.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H, W): the 3x3 kernel takes the border off again."""
        return F.conv2d(self.bordered(x), self.k1, self.b1)


class StackedEdge(Stacked):
    """1x1, then a fixed edge detector on each channel, scaled and shifted."""

    def __init__(self, in_channels: int, out_channels: int, mask: Tensor) -> None:
        super().__init__(in_channels, out_channels)
        self.scale = nn.Parameter(torch.randn(out_channels, 1, 1, 1) * 1e-3)
        self.bias = nn.Parameter(torch.randn(out_channels) * 1e-3)
        fixed = mask.reshape(1, 1, 3, 3).repeat(out_channels, 1, 1, 1)
        self.mask = nn.Parameter(fixed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H, W): channel i is convolved with `scale[i]` times the mask."""
        kernel = self.scale * self.mask
        return F.conv2d(self.bordered(x), kernel, self.bias, groups=kernel.shape[0])


class ECB(Reparameterizable):
    """The edge-oriented block: 3x3, expand-and-squeeze, two Sobel and a Laplace branch, identity.

    `with_idt` adds the input where the widths agree; it has no keys. `act` may also be "prelu".
    """

    deploy_name = "conv3x3"
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        inner: int | None = None,
        *,
        with_idt: bool = False,
        act: str | None = "prelu",
    ) -> None:
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, 3, 1, 1))
        self.identity = with_idt and in_channels == out_channels
        self.conv3x3 = self.geometry.conv(bias=True)
        self.conv1x1_3x3 = StackedDense(in_channels, inner or 2 * out_channels, out_channels)
        sobel = torch.tensor(_SOBEL)
        self.conv1x1_sbx = StackedEdge(*io, sobel)
        self.conv1x1_sby = StackedEdge(*io, sobel.t())
        self.conv1x1_lpl = StackedEdge(*io, torch.tensor(_LAPLACE))
        self.act = nn.PReLU(out_channels) if act == "prelu" else activation(act)

    def branches(self, x: Tensor) -> Tensor:
        """The sum of the five convolutional branches and, where `identity`, the input."""
        out: Tensor = self.conv3x3(x) + self.conv1x1_3x3(x)
        edges: Tensor = self.conv1x1_sbx(x) + self.conv1x1_sby(x) + self.conv1x1_lpl(x)
        out = out + edges
        return out + x if self.identity else out


class ECBSR(nn.Module):
    """`num_blocks` + 2 blocks and a pixel shuffle; the input is added before the shuffle.

    (N, colours, H, W) -> (N, colours, scale * H, scale * W), with `in_channels` colours: one in the
    project; more are each added to the pixels that they become, as in BasicSR.
    """

    def __init__(
        self,
        num_blocks: int,
        width: int,
        scale: int,
        with_idt: bool = False,
        act: str | None = "prelu",
        in_channels: int = 1,
    ) -> None:
        super().__init__()
        blocks = [ECB(in_channels, width, with_idt=with_idt, act=act)]
        blocks += [ECB(width, width, with_idt=with_idt, act=act) for _ in range(num_blocks)]
        blocks.append(ECB(width, in_channels * scale**2, with_idt=with_idt, act=None))
        self.backbone = nn.Sequential(*blocks)
        self.scale = scale
        self.colours = in_channels

    def forward(self, x: Tensor) -> Tensor:
        """The enlarged image, (N, colours, scale * H, scale * W)."""
        near = x if self.colours == 1 else x.repeat_interleave(self.scale**2, dim=1)
        return F.pixel_shuffle(self.backbone(x) + near, self.scale)


_IDENTITY = "`with_idt` is taken to be false: the identity has no keys. Say true in config if so."


def _activation(keys: Keys) -> tuple[Values, str]:
    if "act.weight" in keys:
        return {"act": "prelu"}, "`act.weight` exists: PReLU."
    return {"act": "relu"}, "`act` is taken to be ReLU."


def _read_network(keys: Keys, hints: Values) -> Reading:
    blocks = keys.count("backbone.")
    first, last = keys.under("backbone.0."), keys.under(f"backbone.{blocks - 1}.")
    width, colours, *_ = first.shape("conv3x3.weight")
    outer = last.shape("conv3x3.weight")[0]
    scale = round(ratio(outer, colours) ** 0.5)
    act, told = _activation(first)
    values = {"num_blocks": blocks - 2, "width": width, "scale": scale, "in_channels": colours}
    evidence = (
        f"`backbone` holds {blocks} blocks of {width} channels.",
        f"The last makes {outer} channels of {colours}: the image grows {scale} times.",
    )
    return Reading({**values, **act}, evidence, (_IDENTITY, told))


def _read_block(keys: Keys, hints: Values) -> Reading:
    out, inner, *_ = keys.shape("conv3x3.weight")
    act, told = _activation(keys)
    values: Values = {"in_channels": inner, "out_channels": out, **act}
    if "conv1x1_3x3.k0" in keys:
        values["inner"] = keys.shape("conv1x1_3x3.k0")[0]
    evidence = f"`conv3x3.weight` is {show((out, inner, 3, 3))}, beside Sobel and Laplace branches."
    return Reading(values, (evidence,), (_IDENTITY, told))


ROWS = (
    Family(
        family="ecbsr",
        network="ECBSR",
        signature=re.compile(r"^backbone\.[0-9]+\.(conv3x3|conv1x1_(3x3|sbx|sby|lpl))\."),
        read=_read_network,
        make=ECBSR,
        size=64,
    ),
    Family(
        family="ecbsr",
        network="ECB",
        signature=re.compile(r"^(conv3x3|conv1x1_(3x3|sbx|sby|lpl))\."),
        read=_read_block,
        make=ECB,
        size=32,
    ),
)
