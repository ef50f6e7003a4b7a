"""The Asymmetric Convolution Block (Ding et al., ICCV 2019), keys as in DingXiaoH/ACNet."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show


class ACBlock(Reparameterizable):
    """A KxK, a Kx1 and a 1xK convolution, each with its batch norm, added (paper, figure 2).

    The windows of all three must share their centre: with a padding above K // 2 the thin branches
    pad by the difference along their thin axis, with a smaller one they crop their input by it.
    `affine=False` leaves the norms without scale and shift.
    """

    deploy_name = "fused_conv"
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        *,
        affine: bool = True,
        act: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2 if padding is None else padding
        io, move = (in_channels, out_channels), (dilation, groups)
        super().__init__(Geometry(*io, kernel_size, stride, pad, *move))
        thin = pad - kernel_size // 2
        self.crop = max(0, -thin)
        thin = max(0, thin)
        tall = Geometry(*io, (kernel_size, 1), stride, (pad, thin), *move)
        wide = Geometry(*io, (1, kernel_size), stride, (thin, pad), *move)
        self.act = activation(act)
        self.square_conv = self.geometry.conv(bias=False)
        self.square_bn = nn.BatchNorm2d(out_channels, eps=eps, affine=affine)
        self.ver_conv = tall.conv(bias=False)
        self.hor_conv = wide.conv(bias=False)
        self.ver_bn = nn.BatchNorm2d(out_channels, eps=eps, affine=affine)
        self.hor_bn = nn.BatchNorm2d(out_channels, eps=eps, affine=affine)

    def branches(self, x: Tensor) -> Tensor:
        """The three convolutions, each normed, added: (N, C, H, W) -> (N, out, H', W').

        Where the padding is below K // 2, Kx1 and 1xK read `x` cropped by `crop` along their thin
        axis.
        """
        tall = wide = x
        if self.crop:
            tall = F.pad(x, [-self.crop, -self.crop, 0, 0])
            wide = F.pad(x, [0, 0, -self.crop, -self.crop])
        square: Tensor = self.square_bn(self.square_conv(x))
        thin: Tensor = self.ver_bn(self.ver_conv(tall)) + self.hor_bn(self.hor_conv(wide))
        return square + thin


_KERNELS = ("square_conv.weight", "fused_conv.weight")


def _read(keys: Keys, hints: Values) -> Reading:
    kernel = next((key for key in _KERNELS if key in keys), _KERNELS[0])
    out, inner, size, _ = keys.shape(kernel)
    groups = hints.get("groups") or ratio(hints.get("in_channels", inner), inner)
    values: Values = {
        "in_channels": inner * groups,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
    }
    if kernel == _KERNELS[0]:
        values["affine"] = any(f"{name}_bn.weight" in keys for name in ("square", "ver", "hor"))
    assumed = (
        "`stride` is taken to be 1, which the keys do not tell.",
        f"`padding` is taken to be {size // 2}, half the kernel.",
        f"`groups` is taken to be {groups}, which the keys do not tell.",
        "`act` is taken to be none and batch norm's eps 1e-5, as in the repository.",
    )
    return Reading(values, (f"`{kernel}` is {show(keys.shape(kernel))}: an ACB.",), assumed)


ROWS = (
    Family(
        family="acnet",
        network="ACBlock",
        signature=re.compile(r"^((square|ver|hor)_(conv|bn)|fused_conv)\."),
        read=_read,
        make=ACBlock,
        size=32,
    ),
)
