"""Online convolutional re-parameterization (Hu et al., CVPR 2022), keys as in its repository.

These blocks squeeze while they train: the branches meet as kernels, scaled per output channel by
learned vectors, and the features pass through one convolution and one batch norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNorm, SqueezeExcite, activation
from service.networks.dbb import identity_kernel

EXPANSION = 8
"""Width of the depthwise-separable branch, in times the input's (paper, section 3.3)."""


@dataclass(frozen=True)
class Squeeze:
    """How one squeezed kernel is made: the tensors' key prefix and which branch each row scales.

    `tag` is what follows `weight_` in the keys. Rows of `vector`: 0 the KxK kernel, 1 average
    pooling, 2 the frequency prior, 3 1x1 then KxK; then the 1x1 kernel (only where `point`), then
    the depthwise-separable one. `idle` further rows are stored and never used.
    """

    in_channels: int
    out_channels: int
    kernel_size: int
    groups: int
    tag: str = "orepa"
    point: bool = True
    idle: int = 0

    @property
    def internal(self) -> int:
        """Channels between 1x1 and KxK."""
        wide = self.groups > 4 if self.point else self.groups >= self.out_channels
        return self.in_channels * (2 if wide else 1)


def add_weights(module: nn.Module, spec: Squeeze) -> None:
    """Give `module` the parameters and buffers of a squeezed kernel, freshly initialised."""
    fan, out, size = spec.in_channels // spec.groups, spec.out_channels, spec.kernel_size
    # The repository initialises with a leaky slope of 0, and of 1 in the RepVGG variant.
    slope = 0.0 if spec.point else 1.0

    def kernel(name: str, *shape: int) -> None:
        weight = nn.Parameter(torch.empty(*shape))
        nn.init.kaiming_uniform_(weight, a=slope)
        module.register_parameter(f"weight_{spec.tag}_{name}", weight)

    kernel("origin", out, fan, size, size)
    kernel("avg_conv", out, fan, 1, 1)
    kernel("pfir_conv", out, fan, 1, 1)
    if spec.point:
        kernel("1x1", out, fan, 1, 1)
    # The saved 1x1 kernel is the difference from the identity, as in DBB.
    delta = nn.Parameter(torch.zeros(spec.internal, fan, 1, 1))
    module.register_parameter(f"weight_{spec.tag}_1x1_kxk_idconv1", delta)
    kernel("1x1_kxk_conv2", out, spec.internal // spec.groups, size, size)
    kernel("gconv_dw", spec.in_channels * EXPANSION, 1, size, size)
    kernel("gconv_pw", out, spec.in_channels * EXPANSION // spec.groups, 1, 1)
    scales = [0.25, 0.25, 0.0, 0.5, *([1.0] if spec.point else []), 0.5, *[0.0] * spec.idle]
    vector = torch.tensor(scales).reshape(-1, 1).repeat(1, out)
    module.register_parameter("vector", nn.Parameter(vector))
    average = torch.full((size, size), 1.0 / size**2)
    module.register_buffer(f"weight_{spec.tag}_avg_avg", average)
    eye = identity_kernel(spec.in_channels, spec.groups)
    module.register_buffer("id_tensor", eye.repeat(spec.internal // spec.in_channels, 1, 1, 1))
    module.register_buffer(f"weight_{spec.tag}_prior", frequency_prior(out, size))


def squeeze(module: nn.Module, spec: Squeeze) -> Tensor:
    """(out, in / groups, K, K): the kernel that the branches amount to, before batch norm."""

    def weight(name: str) -> Tensor:
        tensor = getattr(module, f"weight_{spec.tag}_{name}")
        assert isinstance(tensor, Tensor)
        return tensor

    vector = module.get_parameter("vector")
    kernels = [
        weight("origin"),
        weight("avg_conv") * weight("avg_avg"),
        weight("pfir_conv") * weight("prior").unsqueeze(1),
        stack_grouped(
            weight("1x1_kxk_idconv1") + module.get_buffer("id_tensor"),
            weight("1x1_kxk_conv2"),
            spec.groups,
        ),
    ]
    if spec.point:
        kernels.append(F.pad(weight("1x1"), [spec.kernel_size // 2] * 4))
    kernels.append(separable(weight("gconv_dw"), weight("gconv_pw"), spec))
    total = kernels[0] * vector[0].reshape(-1, 1, 1, 1)
    for row, kernel in enumerate(kernels[1:], start=1):
        total = total + kernel * vector[row].reshape(-1, 1, 1, 1)
    return total


def stack_grouped(first: Tensor, second: Tensor, groups: int) -> Tensor:
    """The kernel of a 1x1 convolution followed by a KxK one, both in `groups` groups."""
    inner, fan = first.shape[:2]
    out, width, height, breadth = second.shape
    left = first.reshape(groups, inner // groups, fan)
    right = second.reshape(groups, out // groups, width, height, breadth)
    return torch.einsum("gti,gothw->goihw", left, right).reshape(out, fan, height, breadth)


def separable(depthwise: Tensor, pointwise: Tensor, spec: Squeeze) -> Tensor:
    """The dense kernel of a depthwise convolution followed by a pointwise one.

    With groups the repository reads the pointwise kernel's output axis as (out / groups, groups),
    so its output channels are permuted; trained weights mean that order.
    """
    groups, out, size = spec.groups, spec.out_channels, spec.kernel_size
    per_group = spec.in_channels // groups
    left = depthwise.reshape(groups, per_group, EXPANSION, size, size)
    right = pointwise.reshape(out // groups, groups, per_group, EXPANSION)
    dense = torch.einsum("cgthw,ocgt->coghw", left, right)
    return dense.reshape(out, per_group, size, size)


def frequency_prior(channels: int, size: int) -> Tensor:
    """(C, K, K): cosines along the height in the first half of the channels, then along the width.

    The half is exact, so that with an odd number it falls between two integers.
    """
    index = torch.arange(channels, dtype=torch.float64)
    place = torch.arange(size, dtype=torch.float64) + 0.5
    half = channels / 2
    tall = torch.cos(math.pi * place * (index + 1).unsqueeze(1) / size)
    wide = torch.cos(math.pi * place * (index + 1 - half).unsqueeze(1) / size)
    first = (index < half).reshape(-1, 1, 1)
    prior = torch.where(first, tall.unsqueeze(2), wide.unsqueeze(1))
    return prior.expand(channels, size, size).to(torch.get_default_dtype()).contiguous()


class SqueezedKernel(nn.Module):
    """The weights of one squeezed kernel on their own: a stage of a large kernel."""

    def __init__(self, spec: Squeeze) -> None:
        super().__init__()
        self.spec = spec
        add_weights(self, spec)

    def forward(self) -> Tensor:
        """(out, in / groups, K, K): the kernel itself; no features pass through this module."""
        return squeeze(self, self.spec)


class _OnlineBlock(Reparameterizable):
    """One convolution with a generated kernel, batch norm and an activation."""

    tail = ("act",)

    def __init__(self, geometry: Geometry, act: str | None) -> None:
        super().__init__(geometry)
        self.act = activation(act)

    def kernel(self) -> Tensor:
        """The generated kernel, (out, in / groups, K, K)."""
        raise NotImplementedError

    def branches(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule("bn")(convolve(x, self.kernel(), self.geometry))
        return out


class OREPA(_OnlineBlock):
    """Six branches squeezed into one KxK kernel while training (paper, figure 4)."""

    deploy_name = "orepa_reparam"

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
        act: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2 if padding is None else padding
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, pad, dilation, groups), act)
        self.spec = Squeeze(*io, kernel_size, groups)
        add_weights(self, self.spec)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def kernel(self) -> Tensor:
        """(out, in / groups, K, K): the six branches as kernels, scaled and added."""
        return squeeze(self, self.spec)


class OREPA1x1(_OnlineBlock):
    """A 1x1 kernel and the product of two, of which one begins as the identity."""

    deploy_name = "or1x1_reparam"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        act: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(Geometry(in_channels, out_channels, 1, stride), act)
        wide = torch.empty(out_channels, in_channels, 1, 1)
        inner = min(in_channels, out_channels)
        eye = torch.eye(inner).reshape(inner, inner, 1, 1)
        up = out_channels > in_channels
        self.weight_or1x1_origin = nn.Parameter(wide.clone())
        self.weight_or1x1_l2i_conv1 = nn.Parameter(eye if up else wide.clone())
        self.weight_or1x1_l2i_conv2 = nn.Parameter(wide.clone() if up else eye)
        fresh = self.weight_or1x1_l2i_conv2 if up else self.weight_or1x1_l2i_conv1
        for weight in (self.weight_or1x1_origin, fresh):
            nn.init.kaiming_uniform_(weight, a=1.0)
        self.vector = nn.Parameter(torch.tensor([[1.0], [0.5]]).repeat(1, out_channels))
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def kernel(self) -> Tensor:
        """(out, in, 1, 1): the plain kernel and the pair's product, scaled and added."""
        pair = stack_grouped(self.weight_or1x1_l2i_conv1, self.weight_or1x1_l2i_conv2, 1)
        scale = self.vector.reshape(2, -1, 1, 1, 1)
        return self.weight_or1x1_origin * scale[0] + pair * scale[1]


class OREPALarge(_OnlineBlock):
    """A KxK kernel composed of (K - 1) / 2 kernels of 3x3, each squeezed (`squeezed`) or plain."""

    deploy_name = "or_large_reparam"

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
        squeezed: bool = True,
        act: str | None = None,
        eps: float = 1e-5,
    ) -> None:
        if kernel_size % 2 == 0 or kernel_size < 5:
            raise ValueError(f"kernel_size must be odd and at least 5, not {kernel_size}")
        if squeezed and groups != 1:
            raise ValueError("squeezed 3x3 kernels cannot be composed in groups: only the first is")
        pad = kernel_size // 2 if padding is None else padding
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, pad, dilation, groups), act)
        self.layers = kernel_size // 2
        for index in range(self.layers):
            inner = in_channels if index == 0 else out_channels
            if squeezed:
                spec = Squeeze(inner, out_channels, 3, 1)
                self.add_module(f"weight{index}", SqueezedKernel(spec))
            else:
                weight = nn.Parameter(torch.empty(out_channels, inner // groups, 3, 3))
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                self.register_parameter(f"weight{index}", weight)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps)

    def kernel(self) -> Tensor:
        """(out, in / groups, K, K): the 3x3 kernels composed; each but the first adds 2 to K."""
        stages = [getattr(self, f"weight{index}") for index in range(self.layers)]
        kernels = [stage() if isinstance(stage, SqueezedKernel) else stage for stage in stages]
        # A later kernel slides over the earlier one as over an image, with the input channels as
        # the batch: correlation, because that is what convolution layers compute.
        total: Tensor = kernels[0].transpose(0, 1)
        for kernel in kernels[1:]:
            total = F.conv2d(total, kernel, padding=2, groups=self.geometry.groups)
        return total.transpose(0, 1)


class OREPARepVGGBlock(Reparameterizable):
    """RepVGG's block with the 3x3 branch squeezed from five (OREPA-RepVGG, also in YOLOv7)."""

    deploy_name = "rbr_reparam"
    tail = ("se", "act")

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
        act: str | None = "relu",
        identity: bool | None = None,
        eps: float = 1e-5,
    ) -> None:
        pad = kernel_size // 2 if padding is None else padding
        io = (in_channels, out_channels)
        super().__init__(Geometry(*io, kernel_size, stride, pad, dilation, groups))
        self.act = activation(act)
        self.se = SqueezeExcite(out_channels, se) if se else nn.Identity()
        if identity is None:
            identity = in_channels == out_channels and stride == 1
        self.rbr_identity = nn.BatchNorm2d(in_channels, eps=eps) if identity else None
        spec = Squeeze(*io, kernel_size, groups, tag="rbr", point=False, idle=int(identity))
        self.rbr_dense = SqueezedKernel(spec)
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(out_channels, eps=eps))
        point = Geometry(*io, 1, stride, pad - kernel_size // 2, groups=groups)
        self.rbr_1x1 = ConvNorm(point, eps)

    def branches(self, x: Tensor) -> Tensor:
        """The squeezed kernel's convolution, the 1x1 and any identity, each normed, added."""
        dense: Tensor = self.rbr_dense.get_submodule("bn")(
            convolve(x, self.rbr_dense(), self.geometry)
        )
        out: Tensor = dense + self.rbr_1x1(x)
        return out if self.rbr_identity is None else out + self.rbr_identity(x)


def convolve(x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    """`x` convolved with a generated kernel of that geometry."""
    g = geometry
    return F.conv2d(x, kernel, None, g.stride, g.padding, g.dilation, g.groups)
