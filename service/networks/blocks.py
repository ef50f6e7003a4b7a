"""Small layers that several families share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.errors import InvalidConfig
from service.networks.base import Geometry, Reparameterizable

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "softplus": nn.Softplus,
    "none": nn.Identity,
}


def activation(name: str | None) -> nn.Module:
    """The activation called `name`, in any case; None is the identity.

    Raises InvalidConfig when no activation has that name.
    """
    kind = ACTIVATIONS.get((name or "none").lower())
    if kind is None:
        raise InvalidConfig(
            f"`act` is {name!r}, which names no activation.",
            remedy=f"Use one of {', '.join(ACTIVATIONS)}.",
            field="architecture.act",
        )
    return kind()


class ConvNorm(nn.Sequential):
    """A convolution without bias followed by batch norm, by default under `conv` and `bn`."""

    def __init__(
        self, geometry: Geometry, eps: float = 1e-5, names: tuple[str, str] = ("conv", "bn")
    ) -> None:
        super().__init__()
        self.add_module(names[0], geometry.conv(bias=False))
        self.add_module(names[1], nn.BatchNorm2d(geometry.out_channels, eps=eps))


class ConvBN(Reparameterizable):
    """The plain unit of the DBB and OREPA repositories: `conv`, `bn`, then an activation.

    Its deploy form keeps the name `conv` and gains a bias.
    """

    deploy_name = "conv"
    tail = ("act",)

    def __init__(self, geometry: Geometry, *, act: str | None = None, eps: float = 1e-5) -> None:
        super().__init__(geometry)
        self.act = activation(act)
        self.conv = geometry.conv(bias=False)
        self.bn = nn.BatchNorm2d(geometry.out_channels, eps=eps)

    def branches(self, x: Tensor) -> Tensor:
        """The convolution and its norm; the activation is the block's tail."""
        out: Tensor = self.bn(self.conv(x))
        return out


class BNAndPad(nn.Module):
    """Batch norm whose zero padding is filled with what the norm makes of zero (DBB, section 3.3).

    (N, C, H, W) -> (N, C, H + 2 pad, W + 2 pad). The border value of a channel is
    `beta - mean * gamma / sqrt(var + eps)`: then a biased 1x1 convolution followed by a padded KxK
    one equals a single padded convolution. The norm stays under the key `bn`.
    """

    def __init__(self, channels: int, pad: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=eps)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x` with `pad` positions of `border` on each side.

        While training the norm is the batch's, the border still that of the running statistics.
        """
        out: Tensor = self.bn(x)
        if self.pad == 0:
            return out
        border = self.border()
        if self.training:
            # The official layer lets no gradient reach the norm through its border.
            border = border.detach()
        return F.pad(out - border, [self.pad] * 4) + border

    def border(self) -> Tensor:
        """(1, C, 1, 1): the running norm of zero."""
        bn = self.bn
        if bn.running_mean is None or bn.running_var is None:
            raise TypeError("BNAndPad needs a batch norm with running statistics")
        at_zero = bn.bias - bn.running_mean * bn.weight / torch.sqrt(bn.running_var + bn.eps)
        return at_zero.reshape(1, -1, 1, 1)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scale every channel by a gate of the image's channel means.

    (N, C, H, W) -> the same. `names` are the keys of the reducing and the expanding 1x1
    convolution, which projects spell differently.
    """

    def __init__(
        self, channels: int, internal: int, names: tuple[str, str] = ("down", "up")
    ) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Conv2d(channels, internal, 1))
        self.add_module(names[1], nn.Conv2d(internal, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`x` times a gate in (0, 1), one for each image and channel."""
        reduce, expand = (self.get_submodule(name) for name in self.names)
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(expand(F.relu(reduce(gate))))


class ConvNormInPlace(Reparameterizable):
    """A convolution and a batch norm, called `names`, whose deploy layer takes the pair's place."""

    deploy_name = ""

    def __init__(
        self, geometry: Geometry, eps: float = 1e-5, names: tuple[str, str] = ("conv", "bn")
    ) -> None:
        super().__init__(geometry)
        self.names = names
        self.add_module(names[0], geometry.conv(bias=False))
        self.add_module(names[1], nn.BatchNorm2d(geometry.out_channels, eps=eps))

    def branches(self, x: Tensor) -> Tensor:
        """The convolution, then the norm, found by the names that the project gives them."""
        conv, norm = (self.get_submodule(name) for name in self.names)
        out: Tensor = norm(conv(x))
        return out


class NormLinear(Reparameterizable):
    """Batch norm `bn` before a linear layer called `linear`. (N, C) -> (N, classes)."""

    deploy_name = ""

    def __init__(
        self, channels: int, num_classes: int, *, linear: str = "l", eps: float = 1e-5
    ) -> None:
        super().__init__(Geometry(channels, num_classes, 1))
        self.linear_name = linear
        self.bn = nn.BatchNorm1d(channels, eps=eps)
        self.add_module(linear, nn.Linear(channels, num_classes))

    def deploy_layer(self) -> nn.Module:
        """A linear layer with bias, into which the norm before it goes."""
        return nn.Linear(self.geometry.in_channels, self.geometry.out_channels)

    def branches(self, x: Tensor) -> Tensor:
        """The linear layer of the normed features, (N, C) -> (N, classes)."""
        out: Tensor = self.get_submodule(self.linear_name)(self.bn(x))
        return out


class Residual(nn.Module):
    """`x + m(x)`."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """`x + m(x)`: `m` has to keep the shape."""
        out: Tensor = x + self.m(x)
        return out
