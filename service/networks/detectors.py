"""Re-parameterizable blocks of detectors: YOLOv6 to v10, Ultralytics, RT-DETR, SuperGradients.

Their networks are not rebuilt here (they live in configuration files), their blocks are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNorm, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show


class TwoKernels(Reparameterizable):
    """A large and a small kernel, each with batch norm, and a normed identity, added.

    Subclasses say how their project calls the three (`names`) and the convolution and norm of a
    pair (`pair`). `alpha` is a learned scalar on the small kernel's branch.
    """

    names: ClassVar[tuple[str, str, str]]
    pair: ClassVar[tuple[str, str]] = ("conv", "bn")
    tail: ClassVar[tuple[str, ...]] = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        *,
        small_kernel: int = 1,
        identity: bool = False,
        alpha: bool = False,
        act: str | None = "silu",
        eps: float = 1e-3,
    ) -> None:
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, kernel_size // 2, groups=groups))
        small = Geometry(*io, small_kernel, stride, small_kernel // 2, groups=groups)
        self.identity = identity
        if alpha:
            self.alpha = nn.Parameter(torch.ones(1))
        self.scaled = alpha
        if identity:
            self.add_module(self.names[2], nn.BatchNorm2d(in_channels, eps=eps))
        self.add_module(self.names[0], ConvNorm(self.geometry, eps, self.pair))
        self.add_module(self.names[1], ConvNorm(small, eps, self.pair))
        self.act = activation(act)

    def branches(self, x: Tensor) -> Tensor:
        """Large kernel, small kernel (times `alpha` if learned) and any identity, added."""
        large, small, norm = self.names
        out: Tensor = self.get_submodule(small)(x)
        if self.scaled:
            out = out * self.alpha
        out = self.get_submodule(large)(x) + out
        return out + self.get_submodule(norm)(x) if self.identity else out


class RepConv(TwoKernels):
    """YOLOv9's RepConvN and Ultralytics' RepConv. Here `bn` is the identity, not a last norm."""

    deploy_name = "conv"
    names = ("conv1", "conv2", "bn")


class RTDETRBlock(TwoKernels):
    """RT-DETR's RepVggBlock, whose official deploy form stores the branches beside the layer."""

    deploy_name = "conv"
    names = ("conv1", "conv2", "identity")
    pair = ("conv", "norm")
    stored = ("conv1", "conv2")


class YOLOv7RepConv(TwoKernels):
    """YOLOv7's RepConv: pairs by number."""

    deploy_name = "rbr_reparam"
    names = ("rbr_dense", "rbr_1x1", "rbr_identity")
    pair = ("0", "1")


class YOLOv10RepVGGDW(TwoKernels):
    """YOLOv10's RepVGGDW: depthwise 7x7 and 3x3, no identity (RepViT's namesake has one)."""

    deploy_name = "conv"
    names = ("conv", "conv1", "identity")


class SGRepVGGBlock(TwoKernels):
    """SuperGradients' RepVGGBlock."""

    deploy_name = "rbr_reparam"
    names = ("branch_3x3", "branch_1x1", "no_conv_branch")


class SGQARepVGGBlock(Reparameterizable):
    """SuperGradients' QARepVGGBlock: a bare 1x1 with bias, a bare identity, a norm over the sum.

    Its training form already stores an `rbr_reparam` of meaningless weights.
    """

    deploy_name = "rbr_reparam"
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        *,
        identity: bool | None = None,
        alpha: bool = False,
        point_bias: bool = True,
        post_norm: bool = True,
        act: str | None = "relu",
        eps: float = 1e-5,
    ) -> None:
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, 3, stride, 1, groups=groups))
        same = in_channels == out_channels and stride == 1
        self.identity = same if identity is None else identity
        if alpha:
            self.alpha = nn.Parameter(torch.ones(1))
        self.scaled = alpha
        self.act = activation(act)
        self.branch_3x3 = ConvNorm(self.geometry, eps)
        self.branch_1x1 = Geometry(*io, 1, stride, groups=groups).conv(bias=point_bias)
        self.post_bn = nn.BatchNorm2d(out_channels, eps=eps) if post_norm else nn.Identity()
        self.rbr_reparam = self.geometry.conv(bias=True)

    def branches(self, x: Tensor) -> Tensor:
        """The last norm over the sum of 3x3, 1x1 (times `alpha` if learned) and identity."""
        point: Tensor = self.branch_1x1(x)
        out: Tensor = self.branch_3x3(x) + (point * self.alpha if self.scaled else point)
        normed: Tensor = self.post_bn(out + x if self.identity else out)
        return normed


class ChannelScale(nn.Module):
    """A learned factor a channel, under the key `weight`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same, each channel times its factor."""
        return x * self.weight.reshape(1, -1, 1, 1)


class LinearAddBlock(Reparameterizable):
    """YOLOv6's search block for RepOpt: scaled 3x3, scaled 1x1, scaled identity, a norm.

    The project has no conversion; the layer is called as in its other blocks.
    """

    deploy_name = "rbr_reparam"
    tail = ("act",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        identity: bool | None = None,
        act: str | None = "relu",
        eps: float = 1e-3,
    ) -> None:
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, 3, stride, 1))
        if identity is None:
            identity = in_channels == out_channels and stride == 1
        self.act = activation(act)
        self.conv = self.geometry.conv(bias=False)
        self.scale_conv = ChannelScale(out_channels)
        self.conv_1x1 = Geometry(*io, 1, stride).conv(bias=False)
        self.scale_1x1 = ChannelScale(out_channels)
        self.scale_identity = ChannelScale(out_channels) if identity else None
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def branches(self, x: Tensor) -> Tensor:
        """The norm over the sum of the scaled 3x3, the scaled 1x1 and, if any, the scaled input."""
        out: Tensor = self.scale_conv(self.conv(x)) + self.scale_1x1(self.conv_1x1(x))
        out = out if self.scale_identity is None else out + self.scale_identity(x)
        normed: Tensor = self.bn(out)
        return normed


class ImplicitHead(Reparameterizable):
    """One level of YOLOv7's detection head: an implicit addend, a 1x1, an implicit factor."""

    deploy_name = "m.0"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(Geometry(in_channels, out_channels, 1))
        self.m = nn.ModuleList([self.geometry.conv(bias=True)])
        self.ia = nn.ModuleList([_Implicit(in_channels, 0.0)])
        self.im = nn.ModuleList([_Implicit(out_channels, 1.0)])

    def branches(self, x: Tensor) -> Tensor:
        """`m.0(x + ia.0) * im.0`, (N, in, H, W) -> (N, out, H, W)."""
        add, times = self.ia[0], self.im[0]
        assert isinstance(add, _Implicit)
        assert isinstance(times, _Implicit)
        out: Tensor = self.m[0](x + add.implicit)
        return out * times.implicit


class _Implicit(nn.Module):
    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.full((1, channels, 1, 1), value))


def _read_two(kind: type[TwoKernels], keys: Keys, hints: Values) -> Reading:
    large, small, norm = kind.names
    kernels = (f"{large}.{kind.pair[0]}.weight", f"{kind.deploy_name}.weight")
    kernel = next((key for key in kernels if key in keys), kernels[0])
    out, inner, size, _ = keys.shape(kernel)
    identity = keys.any(f"{norm}.")
    groups = ratio(out, inner) if identity else hints.get("groups")
    groups = groups or ratio(hints.get("in_channels", inner), inner)
    values: Values = {
        "in_channels": inner * groups,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
        "identity": identity,
        "alpha": "alpha" in keys,
    }
    beside = f"{small}.{kind.pair[0]}.weight"
    if beside in keys:
        values["small_kernel"] = keys.shape(beside)[2]
    evidence = f"`{kernel}` is {show(keys.shape(kernel))}, beside `{small}`."
    return Reading(values, (evidence,), _assumed(groups))


def _read_bare(kernel: str, keys: Keys, hints: Values) -> Reading:
    out, inner, *_ = keys.shape(kernel, "rbr_reparam.weight")
    groups = hints.get("groups") or ratio(hints.get("in_channels", inner), inner)
    values: Values = {"in_channels": inner * groups, "out_channels": out}
    if kernel == "conv.weight":
        if keys.any("conv."):
            values["identity"] = keys.any("scale_identity.")
    else:
        values["groups"] = groups
        values["alpha"] = "alpha" in keys
        if keys.any("branch_1x1."):
            values["point_bias"] = "branch_1x1.bias" in keys
            values["post_norm"] = keys.any("post_bn.")
    evidence = f"`{kernel}` tells {inner * groups} input and {out} output channels."
    unseen = "`identity` is taken to exist where shape and stride allow; it has no keys."
    return Reading(values, (evidence,), (*_assumed(groups), unseen))


def _read_implicit(keys: Keys, hints: Values) -> Reading:
    out, inner, *_ = keys.shape("m.0.weight")
    told = f"`ia.0` is added to {inner} channels, `im.0` scales the {out} of `m.0`."
    return Reading({"in_channels": inner, "out_channels": out}, (told,))


def _assumed(groups: int) -> tuple[str, ...]:
    return (
        "`stride` is taken to be 1, which the keys do not tell.",
        f"`groups` is taken to be {groups}, which the keys do not tell without an identity.",
        "`act` and batch norm's eps are the project's: SiLU and 1e-3 in YOLO, or as config says.",
    )


def _row(
    family: str,
    network: str,
    children: str,
    signature: str,
    read: Callable[[Keys, Values], Reading],
    make: Callable[..., nn.Module],
) -> Family:
    """A bare block: only state dicts whose every key lies under `children` are one."""
    whole = re.compile(rf"^({children})(\.|$)")
    return Family(family, network, re.compile(signature), read, make, size=32, whole=whole)


_SG = "branch_3x3|branch_1x1|alpha|rbr_reparam"

ROWS = (
    _row(
        "yolov10",
        "YOLOv10-RepVGGDW",
        "conv|conv1",
        r"^conv\.conv\.",
        partial(_read_two, YOLOv10RepVGGDW),
        partial(YOLOv10RepVGGDW, kernel_size=7, small_kernel=3),
    ),
    _row(
        "rtdetr",
        "RTDETR-RepVggBlock",
        "conv|conv1|conv2",
        r"^conv[12]\.norm\.",
        partial(_read_two, RTDETRBlock),
        partial(RTDETRBlock, eps=1e-5),
    ),
    _row(
        "yolov9", "RepConv", "conv1|conv2|bn", r"^conv2\.bn\.", partial(_read_two, RepConv), RepConv
    ),
    _row(
        "yolov7",
        "YOLOv7-RepConv",
        "rbr_dense|rbr_1x1|rbr_identity",
        r"^rbr_dense\.[01]\.",
        partial(_read_two, YOLOv7RepConv),
        YOLOv7RepConv,
    ),
    _row(
        "supergradients",
        "SG-RepVGGBlock",
        f"{_SG}|no_conv_branch",
        r"^branch_1x1\.conv\.",
        partial(_read_two, SGRepVGGBlock),
        partial(SGRepVGGBlock, act="relu", eps=1e-5),
    ),
    _row(
        "supergradients",
        "SG-QARepVGGBlock",
        f"{_SG}|post_bn",
        r"^branch_1x1\.weight$",
        partial(_read_bare, "branch_3x3.conv.weight"),
        SGQARepVGGBlock,
    ),
    _row(
        "yolov6",
        "YOLOv6-LinearAddBlock",
        "conv|conv_1x1|scale_conv|scale_1x1|scale_identity|bn",
        r"^scale_(conv|1x1)\.",
        partial(_read_bare, "conv.weight"),
        LinearAddBlock,
    ),
    _row(
        "yolov7",
        "YOLOv7-ImplicitHead",
        "m|ia|im",
        r"^i[am]\.0\.implicit$",
        _read_implicit,
        ImplicitHead,
    ),
)
