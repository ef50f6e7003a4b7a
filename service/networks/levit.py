"""LeViT (Graham et al., ICCV 2021) with timm's keys: attention whose every map has a batch norm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvNormInPlace, NormLinear, activation
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio


class ChannelLinear(nn.Linear):
    """A linear layer over the channels of (N, C, T), with the keys and shapes of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features, T) -> (N, out_features, T)."""
        return F.conv1d(x, self.weight.unsqueeze(2), self.bias)


class LinearNorm(Reparameterizable):
    """A linear map over the channels of tokens and its batch norm. (N, C, T) -> (N, D, T)."""

    deploy_name = ""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(Geometry(channels, out_channels, 1))
        self.linear = ChannelLinear(channels, out_channels, bias=False)
        self.bn = nn.BatchNorm1d(out_channels)

    def deploy_layer(self) -> nn.Module:
        """A ChannelLinear with bias, which the norm goes into."""
        return ChannelLinear(self.geometry.in_channels, self.geometry.out_channels)

    def branches(self, x: Tensor) -> Tensor:
        """The map and its norm, whose statistics run over batch and tokens."""
        out: Tensor = self.bn(self.linear(x))
        return out


def offsets(size: int, stride: int = 1) -> Tensor:
    """(queries, keys): which bias a pair of positions of a `size` x `size` map has.

    A bias belongs to a distance in height and width; queries stand at every `stride`-th position.
    """
    axis = torch.arange(size)
    keys = torch.cartesian_prod(axis, axis)
    queries = torch.cartesian_prod(axis[::stride], axis[::stride])
    distance = (queries.unsqueeze(1) - keys.unsqueeze(0)).abs()
    return distance[..., 0] * size + distance[..., 1]


class PositionBias(nn.Module):
    """Mixin of both attentions: `attention_biases` and its lookup."""

    index: Tensor

    def add_biases(self, heads: int, size: int, stride: int) -> None:
        """Register the biases of `heads` heads over a `size` x `size` map."""
        self.attention_biases = nn.Parameter(torch.zeros(heads, size * size))
        self.register_buffer("index", offsets(size, stride), persistent=False)

    def biases(self) -> Tensor:
        """(heads, queries, keys)."""
        flat = self.attention_biases.index_select(1, self.index.flatten())
        return flat.reshape(-1, *self.index.shape)


class Wrapped(nn.Sequential):
    """An activation and a LinearNorm under the key `ln`."""

    def __init__(self, channels: int, out_channels: int, act: str | None) -> None:
        super().__init__()
        self.add_module("act", activation(act))
        self.add_module("ln", LinearNorm(channels, out_channels))


class Attention(PositionBias):
    """Self-attention over a map of `size` x `size` tokens."""

    def __init__(
        self, channels: int, key: int, value: int, heads: int, size: int, act: str
    ) -> None:
        super().__init__()
        self.sizes, self.heads = [key, key, value], heads
        self.qkv = LinearNorm(channels, heads * (2 * key + value))
        self.proj = Wrapped(value * heads, channels, act)
        self.add_biases(heads, size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, size ** 2) -> the same; tokens are the map's positions row by row."""
        tokens = x.shape[2]
        parts = self.qkv(x).reshape(-1, self.heads, sum(self.sizes), tokens)
        query, key, value = parts.split(self.sizes, 2)
        weights = query.transpose(2, 3) @ key * self.sizes[0] ** -0.5 + self.biases()
        mixed = (value @ torch.softmax(weights, -1).transpose(2, 3)).flatten(1, 2)
        out: Tensor = self.proj(mixed)
        return out


class AttentionDownsample(PositionBias):
    """Attention from every second position in each direction to all of them."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        key: int,
        value: int,
        heads: int,
        size: int,
        act: str,
    ) -> None:
        super().__init__()
        self.sizes, self.heads, self.size = [key, value], heads, size
        self.kv = LinearNorm(channels, heads * (key + value))
        self.q = nn.Sequential()
        self.q.add_module("ln", LinearNorm(channels, heads * key))
        self.proj = Wrapped(value * heads, out_channels, act)
        self.add_biases(heads, size, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, size ** 2) -> (N, out, ceil(size / 2) ** 2)."""
        channels, tokens = x.shape[1:]
        parts = self.kv(x).reshape(-1, self.heads, sum(self.sizes), tokens)
        key, value = parts.split(self.sizes, 2)
        grid = x.reshape(-1, channels, self.size, self.size)[:, :, ::2, ::2].flatten(2)
        query = self.q(grid).reshape(-1, self.heads, self.sizes[0], grid.shape[2])
        weights = query.transpose(2, 3) @ key * self.sizes[0] ** -0.5 + self.biases()
        mixed = (value @ torch.softmax(weights, -1).transpose(2, 3)).flatten(1, 2)
        out: Tensor = self.proj(mixed)
        return out


class Perceptron(nn.Module):
    """Two normed linear maps with an activation between."""

    def __init__(self, channels: int, hidden: int, act: str) -> None:
        super().__init__()
        self.ln1 = LinearNorm(channels, hidden)
        self.act = activation(act)
        self.ln2 = LinearNorm(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> the same, by way of `hidden` channels and without a residual of its own."""
        out: Tensor = self.ln2(self.act(self.ln1(x)))
        return out


class Block(nn.Module):
    """Attention and perceptron, both residual."""

    def __init__(self, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> the same: `x + attn(x)`, then the same with `mlp`."""
        x = x + self.attn(x)
        out: Tensor = x + self.mlp(x)
        return out


class Downsample(nn.Module):
    """Downsampling attention, then a residual perceptron."""

    def __init__(self, attn_downsample: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attn_downsample = attn_downsample
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> (N, out, about T / 4); only the perceptron has a residual."""
        x = self.attn_downsample(x)
        out: Tensor = x + self.mlp(x)
        return out


class Stage(nn.Module):
    """A downsampling, absent in the first stage, and blocks."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T) -> (N, out, T'): the blocks over the downsampled tokens, or over `x` itself."""
        out: Tensor = self.blocks(self.downsample(x))
        return out


class LeViT(nn.Module):
    """Strided convolutions, stages of attention on tokens, the mean token, one or two heads.

    (N, in_channels, S, S) -> (N, num_classes), where S = `resolution` * 2 ** `stem_layers`: the
    position biases fix the input size. `heads[i]` attend in stage i with keys `key` wide and values
    `attn_ratio` times that; downsampling uses four times.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        heads: Sequence[int],
        key: int,
        attn_ratio: int = 2,
        mlp_ratio: int = 2,
        resolution: int = 14,
        stem_layers: int = 4,
        distilled: bool = True,
        act: str = "hardswish",
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        channels = in_channels
        for index in range(stem_layers):
            width = widths[0] // 2 ** (stem_layers - 1 - index)
            layer = ConvNormInPlace(Geometry(channels, width, 3, 2, 1), names=("linear", "bn"))
            self.stem.add_module(f"conv{index + 1}", layer)
            if index + 1 < stem_layers:
                self.stem.add_module(f"act{index + 1}", activation(act))
            channels = width
        self.stages = nn.Sequential()
        size = resolution
        for index, (depth, width) in enumerate(zip(num_blocks, widths, strict=True)):
            down: nn.Module = nn.Identity()
            if index:
                attention = AttentionDownsample(
                    channels, width, key, 4 * key, channels // key, size, act
                )
                down = Downsample(attention, Perceptron(width, 2 * width, act))
                size = (size - 1) // 2 + 1
            blocks = [
                Block(
                    Attention(width, key, attn_ratio * key, heads[index], size, act),
                    Perceptron(width, mlp_ratio * width, act),
                )
                for _ in range(depth)
            ]
            self.stages.append(Stage(down, blocks))
            channels = width
        self.head = NormLinear(channels, num_classes, linear="linear")
        self.head_dist = NormLinear(channels, num_classes, linear="linear") if distilled else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes); of a distilled network the mean of both heads'."""
        tokens = self.stages(self.stem(x).flatten(2)).mean(2)
        logits: Tensor = self.head(tokens)
        return logits if self.head_dist is None else (logits + self.head_dist(tokens)) / 2


def _published(
    depths: Sequence[int], widths: Sequence[int], heads: Sequence[int], key: int
) -> Values:
    return {"num_blocks": list(depths), "widths": list(widths), "heads": list(heads), "key": key}


LEVIT: Mapping[str, Values] = {
    "LeViT-128S": _published((2, 3, 4), (128, 256, 384), (4, 6, 8), 16),
    "LeViT-128": _published((4, 4, 4), (128, 256, 384), (4, 8, 12), 16),
    "LeViT-192": _published((4, 4, 4), (192, 288, 384), (3, 5, 6), 32),
    "LeViT-256": _published((4, 4, 4), (256, 384, 512), (4, 6, 8), 32),
    "LeViT-384": _published((4, 4, 4), (384, 512, 768), (6, 9, 12), 32),
}
"""The published networks (paper, table 2)."""


def _read(keys: Keys, hints: Values) -> Reading:
    stages = [keys.under(f"stages.{i}.") for i in range(keys.count("stages."))]
    depths = [stage.count("blocks.") for stage in stages]
    widths = [stage.under("blocks.0.mlp.ln2.").width() for stage in stages]
    heads = [stage.shape("blocks.0.attn.attention_biases", rank=2)[0] for stage in stages]
    first = stages[0] if stages else keys
    linear = ("linear.weight", "weight")
    total = first.under("blocks.0.attn.qkv.").shape(*linear, rank=2)[0]
    values_out = first.under("blocks.0.attn.proj.ln.").shape(*linear, rank=2)[1]
    hidden = first.under("blocks.0.mlp.ln1.").shape(*linear, rank=2)[0]
    key = max(1, (total - values_out) // (2 * heads[0]))
    resolution = round(first.shape("blocks.0.attn.attention_biases", rank=2)[1] ** 0.5)
    layers = keys.under("stem.conv").count_from(1)
    classes = keys.under("head.").shape(*linear, rank=2)[0]
    values: Values = {
        "num_blocks": depths,
        "widths": widths,
        "heads": heads,
        "key": key,
        "attn_ratio": ratio(values_out, heads[0] * key),
        "mlp_ratio": ratio(hidden, widths[0]),
        "resolution": resolution,
        "stem_layers": layers,
        "distilled": keys.any("head_dist."),
        "in_channels": keys.under("stem.conv1.").shape(*linear)[1],
        "num_classes": classes,
    }
    evidence = (
        f"The stages hold {depths} blocks of {widths} channels and {heads} heads.",
        f"The position biases cover {resolution}x{resolution} tokens, {2**layers} pixels each.",
    )
    act = "`act` is taken to be hard swish and batch norm's eps 1e-5, as in the paper."
    return Reading(values, evidence, (act,), size=resolution * 2**layers)


ROWS = (
    Family(
        family="levit",
        network="LeViT",
        signature=re.compile(r"^stages\.[0-9]+\.(blocks\.[0-9]+\.attn|downsample\.attn_downs)"),
        read=_read,
        make=LeViT,
        named=LEVIT,
    ),
)
