"""The CIFAR and ImageNet networks of DingXiaoH/ACNet, with its key names.

Its builder writes a 3x3 or 5x5 convolution with batch norm as an ACB and leaves 1x1 and 7x7 plain;
what a ReLU follows or precedes is wrapped (`acb`, `relu`; `bn`, `relu`, `acb`). Plain pairs keep
their batch norm in the official deploy form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.acb import ACBlock
from service.networks.base import Geometry
from service.networks.blocks import ConvNorm
from service.networks.mobilenet import WIDTHS, published_strides


def conv_norm(geometry: Geometry) -> nn.Module:
    """A convolution with batch norm, as an ACB where the builder makes one."""
    size = geometry.kernel_size
    if not isinstance(size, int) or size == 1 or size >= 7:
        return ConvNorm(geometry)
    g = geometry
    return ACBlock(g.in_channels, g.out_channels, size, g.stride, size // 2, 1, g.groups)


def conv_norm_relu(geometry: Geometry) -> nn.Sequential:
    """The same followed by ReLU."""
    inner = conv_norm(geometry)
    if isinstance(inner, ConvNorm):
        inner.add_module("relu", nn.ReLU())
        return inner
    wrapped = nn.Sequential()
    wrapped.add_module("acb", inner)
    wrapped.add_module("relu", nn.ReLU())
    return wrapped


def norm_relu_conv(geometry: Geometry) -> nn.Sequential:
    """Batch norm and ReLU before an ACB, or before a bare 1x1 convolution."""
    wrapped = nn.Sequential()
    wrapped.add_module("bn", nn.BatchNorm2d(geometry.in_channels))
    wrapped.add_module("relu", nn.ReLU())
    inner = conv_norm(geometry)
    if isinstance(inner, ConvNorm):
        wrapped.add_module("conv", geometry.conv(bias=False))
    else:
        wrapped.add_module("acb", inner)
    return wrapped


def pooled(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C): the mean of every channel."""
    return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


class CifarQuick(nn.Module):
    """Cifar-quick with batch norm: three 5x5 layers. (N, in_channels, 32, 32) -> (N, classes)."""

    def __init__(
        self,
        widths: Sequence[int] = (32, 32, 64),
        hidden: int = 64,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = conv_norm_relu(Geometry(in_channels, first, 5, padding=2))
        self.conv2 = conv_norm_relu(Geometry(first, second, 5, padding=2))
        self.conv3 = conv_norm_relu(Geometry(second, third, 5, padding=2))
        self.fc1 = nn.Linear(third * 9, hidden)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes); the three poolings leave 15x15, 7x7 and 3x3 positions."""
        x = F.max_pool2d(self.conv1(x), 3, 2)
        x = F.avg_pool2d(self.conv2(x), 3, 2)
        x = F.avg_pool2d(self.conv3(x), 3, 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))
        return logits


_POOLED = (2, 4, 7, 10, 13)
"""The VGG-16 layers after which a 2x2 max pooling stands."""


class CifarVGG(nn.Module):
    """VGG-16 for CIFAR: thirteen 3x3 layers, two linear ones. (N, C, 32, 32) -> (N, classes)."""

    def __init__(
        self,
        widths: Sequence[int] = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
        hidden: int = 512,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        channels = in_channels
        for layer, width in enumerate(widths, start=1):
            self.stem.add_module(
                f"conv{layer}", conv_norm_relu(Geometry(channels, width, 3, padding=1))
            )
            channels = width
            if layer in _POOLED:
                self.stem.add_module(f"maxpool{_POOLED.index(layer) + 1}", nn.MaxPool2d(2))
        self.linear1 = nn.Linear(channels, hidden)
        self.linear2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes); five poolings leave one position of 32x32, as `linear1` needs."""
        x = torch.flatten(self.stem(x), 1)
        logits: Tensor = self.linear2(F.relu(self.linear1(x)))
        return logits


class Branch(nn.Module):
    """The residual branch: 3x3, 3x3; or 1x1, 3x3, 1x1 where `inner` differs from None."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, inner: int | None) -> None:
        super().__init__()
        if inner is None:
            self.conv1 = conv_norm_relu(Geometry(in_channels, out_channels, 3, stride, 1))
            self.conv2 = conv_norm(Geometry(out_channels, out_channels, 3, padding=1))
        else:
            self.conv1 = conv_norm_relu(Geometry(in_channels, inner, 1))
            self.conv2 = conv_norm_relu(Geometry(inner, inner, 3, stride, 1))
            self.conv3 = conv_norm(Geometry(inner, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The layers in turn, the last without ReLU; the stride divides the sides, rounded up."""
        for layer in self.children():
            x = layer(x)
        return x


class ShortcutBlock(nn.Module):
    """A basic residual block that owns its shortcut, as in the repository's plain ResNets."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        same = stride == 1 and in_channels == out_channels
        project = Geometry(in_channels, out_channels, 1, stride)
        self.shortcut = nn.Identity() if same else conv_norm(project)
        self.conv1 = conv_norm_relu(Geometry(in_channels, out_channels, 3, stride, 1))
        self.conv2 = conv_norm(Geometry(out_channels, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of both layers plus the shortcut; the stride divides the sides, rounded up."""
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class ShortcutResNet(nn.Module):
    """ImageNet ResNet-18 and -34. (N, in_channels, H, W) -> (N, classes)."""

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        stem_width: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(Geometry(in_channels, stem_width, 7, 2, 3))
        self.num_stages = len(num_blocks)
        channels = stem_width
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = 2 if index and place == 0 else 1
                stage.append(ShortcutBlock(channels, width, stride))
                channels = width
            self.add_module(f"stage{index + 1}", stage)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes); the stem divides H and W by 4, each stage but the first by 2."""
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        for index in range(self.num_stages):
            x = self.get_submodule(f"stage{index + 1}")(x)
        logits: Tensor = self.linear(pooled(x))
        return logits


class Stage(nn.Module):
    """Residual branches `block0`, ... of one width behind one projection.

    The first stage of a CIFAR network has a 3x3 `conv1` and ReLU instead of the projection.
    """

    def __init__(
        self, in_channels: int, width: int, depth: int, stride: int, inner: int | None, first: bool
    ) -> None:
        super().__init__()
        self.first = first
        if first:
            self.conv1 = conv_norm(Geometry(in_channels, width, 3, padding=1))
        else:
            self.projection = conv_norm(Geometry(in_channels, width, 1, stride))
        self.depth = depth
        for index in range(depth):
            channels = in_channels if index == 0 and not first else width
            branch = Branch(channels, width, stride if index == 0 else 1, inner)
            self.add_module(f"block{index}", branch)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU of branch plus shortcut, block after block: (N, C, H, W) -> (N, width, H', W').

        The first shortcut is the projection of `x`, or what `conv1` and ReLU make of it.
        """
        if self.first:
            x = F.relu(self.conv1(x))
            shortcut = x
        else:
            shortcut = self.projection(x)
        for index in range(self.depth):
            x = F.relu(shortcut + self.get_submodule(f"block{index}")(x))
            shortcut = x
        return x


class CifarResNet(nn.Module):
    """ResNet-56, -110 and -164 for CIFAR. (N, in_channels, 32, 32) -> (N, classes)."""

    def __init__(
        self,
        num_blocks: Sequence[int] = (9, 9, 9),
        widths: Sequence[int] = (16, 32, 64),
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        channels = in_channels
        self.num_stages = len(num_blocks)
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            stage = Stage(channels, width, depth, 2 if index else 1, None, index == 0)
            self.add_module(f"stage{index + 1}", stage)
            channels = width
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the channel means; each stage but the first halves the sides."""
        for index in range(self.num_stages):
            x = self.get_submodule(f"stage{index + 1}")(x)
        logits: Tensor = self.linear(pooled(x))
        return logits


class StageResNet(nn.Module):
    """ImageNet ResNet-50, -101 and -152 with one projection a stage."""

    def __init__(
        self,
        num_blocks: Sequence[int],
        planes: Sequence[int] = (64, 128, 256, 512),
        widths: Sequence[int] = (256, 512, 1024, 2048),
        stem_width: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(Geometry(in_channels, stem_width, 7, 2, 3))
        channels = stem_width
        self.num_stages = len(num_blocks)
        for index, depth in enumerate(num_blocks):
            stage = Stage(channels, widths[index], depth, 2 if index else 1, planes[index], False)
            self.add_module(f"stage{index + 1}", stage)
            channels = widths[index]
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, classes); the stem divides H and W by 4."""
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        for index in range(self.num_stages):
            x = self.get_submodule(f"stage{index + 1}")(x)
        logits: Tensor = self.fc(pooled(x))
        return logits


class WideBlock(nn.Module):
    """A pre-activation residual block of a wide ResNet."""

    def __init__(self, in_channels: int, width: int, stride: int, projected: bool) -> None:
        super().__init__()
        project = Geometry(in_channels, width, 1, stride)
        self.proj = norm_relu_conv(project) if projected else nn.Identity()
        self.conv1 = norm_relu_conv(Geometry(in_channels, width, 3, stride, 1))
        self.conv2 = norm_relu_conv(Geometry(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Both layers plus `x`, which is projected if the block has that; no ReLU after the sum."""
        out: Tensor = self.conv2(self.conv1(x)) + self.proj(x)
        return out


class WideResNet(nn.Module):
    """WRN-16-8 for CIFAR without dropout. (N, in_channels, 32, 32) -> (N, classes)."""

    def __init__(
        self,
        num_blocks: Sequence[int] = (2, 2, 2),
        widths: Sequence[int] = (128, 256, 512),
        stem_width: int = 16,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm(Geometry(in_channels, stem_width, 3, padding=1))
        channels = stem_width
        self.num_stages = len(num_blocks)
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            stage = nn.Sequential()
            for place in range(depth):
                stride = 2 if index and place == 0 else 1
                stage.add_module(
                    f"block{place + 1}", WideBlock(channels, width, stride, place == 0)
                )
                channels = width
            self.add_module(f"stage{index + 1}", stage)
        self.last_bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of the channel means behind `last_bn`, which no ReLU follows."""
        x = self.conv1(x)
        for index in range(self.num_stages):
            x = self.get_submodule(f"stage{index + 1}")(x)
        logits: Tensor = self.linear(pooled(self.last_bn(x)))
        return logits


CIFAR_WIDTHS = (16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
CIFAR_STRIDES = (1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class WrappedSeparable(nn.Module):
    """A depthwise 3x3 layer and a 1x1 layer."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        depthwise = Geometry(in_channels, in_channels, 3, stride, 1, groups=in_channels)
        self.depthwise = conv_norm_relu(depthwise)
        self.pointwise = conv_norm_relu(Geometry(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out, H', W'); the stride divides the sides, rounded up."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


class MobileNet(nn.Module):
    """MobileNet-V1: 13 depthwise-separable blocks under `stem`."""

    def __init__(
        self,
        stem_width: int = 32,
        widths: Sequence[int] = WIDTHS,
        strides: Sequence[int] | None = None,
        stem_stride: int = 2,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        strides = strides or published_strides(len(widths))
        self.conv1 = conv_norm_relu(Geometry(in_channels, stem_width, 3, stem_stride, 1))
        pairs = zip((stem_width, *widths), widths, strides, strict=False)
        self.stem = nn.Sequential(*(WrappedSeparable(*pair) for pair in pairs))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> logits (N, classes) of the channel means behind `stem`."""
        logits: Tensor = self.linear(pooled(self.stem(self.conv1(x))))
        return logits
