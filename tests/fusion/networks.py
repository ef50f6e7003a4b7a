"""Small networks as programs, each with what one kind of engine fault needs in order to matter."""

from __future__ import annotations

from service.graph.program import Program, Ref
from tests.graph.builder import Builder

END = (1 << 63) - 1


def head(build: Builder, x: Ref) -> Program:
    """ReLU, mean over the map, five class scores."""
    x = build.call("mean.dim", self=build.relu(x), dim=(2, 3))
    channels = build.shape(x)[1] or 1
    weight = build.normal(5, channels, scale=channels**-0.5)
    return build.program(build.call("linear", input=x, weight=weight, bias=build.normal(5)))


def bordered(build: Builder, x: Ref, reach: int, eps: float = 1e-5) -> Ref:
    """Batch norm, then a border of what the norm makes of zero, as Diverse Branch Block pads."""
    y = build.norm(x, eps=eps)
    weight, bias, mean, variance = (
        build.nodes[-1].args[key] for key in ("weight", "bias", "running_mean", "running_var")
    )
    deviation = build.call("sqrt", self=build.call("add.Scalar", self=variance, other=eps))
    product = build.call("mul.Tensor", self=mean, other=weight)
    quotient = build.call("div.Tensor", self=product, other=deviation)
    fill = build.call("sub.Tensor", self=bias, other=quotient)
    fill = build.call("view", self=fill, size=(-1, 1, 1))
    y = build.call("pad", self=y, pad=(reach,) * 4)
    for axis in (2, 3):
        for start, end in ((0, reach), (-reach, END)):
            part = build.call("slice.Tensor", self=y, dim=axis, start=start, end=end)
            value = build.call("copy", self=part, src=fill)
            y = build.call("slice_scatter", self=y, src=value, dim=axis, start=start, end=end)
    return y


def repvgg(groups: int = 1, stride: int = 1) -> Program:
    """3x3, 1x1 and (at stride 1) identity branches, each with its batch norm."""
    build = Builder(1)
    x = build.input(8, 7, 7)
    y = _conv_norm(build, x, 8, (3, 3), (1, 1), groups, stride)
    y = build.add(y, _conv_norm(build, x, 8, (1, 1), (0, 0), groups, stride))
    if stride == 1:
        y = build.add(y, build.norm(x))
    return head(build, y)


def _conv_norm(
    build: Builder,
    x: Ref,
    out: int,
    kernel: tuple[int, int],
    padding: tuple[int, int],
    groups: int = 1,
    stride: int = 1,
) -> Ref:
    y = build.conv(
        x, out, kernel, padding=padding, groups=groups, stride=(stride, stride), bias=False
    )
    return build.norm(y, eps=1e-3)


def acnet() -> Program:
    """Square, horizontal and vertical kernels."""
    build = Builder(2)
    x = build.input(4, 6, 6)
    y = _conv_norm(build, x, 6, (3, 3), (1, 1))
    y = build.add(y, _conv_norm(build, x, 6, (1, 3), (0, 1)))
    return head(build, build.add(y, _conv_norm(build, x, 6, (3, 1), (1, 0))))


def dbb(groups: int = 2, reach: int = 1) -> Program:
    """KxK, 1x1, 1x1-KxK and 1x1-average branches with filled borders."""
    build = Builder(3)
    x = build.input(8, 7, 7)
    kernel = (2 * reach + 1,) * 2
    y = _conv_norm(build, x, 8, kernel, (reach, reach), groups)
    y = build.add(y, _conv_norm(build, x, 8, (1, 1), (0, 0), groups))
    inner = bordered(build, build.conv(x, 8, (1, 1), groups=groups, bias=False), reach)
    inner = build.norm(build.conv(inner, 8, kernel, groups=groups, bias=False))
    y = build.add(y, inner)
    pooled = bordered(build, build.conv(x, 8, (1, 1), groups=groups, bias=False), reach)
    pooled = build.call("avg_pool2d", self=pooled, kernel_size=kernel, stride=(1, 1))
    return head(build, build.add(y, build.norm(pooled)))


def chain() -> Program:
    """1x1, 3x3 of stride 2, 1x1 with biases: an expanding and a reducing convolution."""
    build = Builder(4)
    x = build.input(3, 9, 9)
    y = build.conv(x, 12, (1, 1))
    y = build.conv(y, 12, (3, 3), stride=(2, 2))
    return head(build, build.conv(y, 4, (1, 1)))


def spatial_chain() -> Program:
    """3x3 of stride 2 and 2x3 after it, with one input channel so that composing pays."""
    build = Builder(5)
    x = build.input(1, 15, 15)
    y = build.conv(x, 8, (3, 3), stride=(2, 2))
    return head(build, build.conv(y, 8, (2, 3)))


def dilated() -> Program:
    """A dense 5x5 kernel and a dilated 3x3 one, depthwise (UniRepLKNet)."""
    build = Builder(6)
    x = build.input(4, 8, 8)
    y = build.norm(build.conv(x, 4, (5, 5), padding=(2, 2), groups=4, bias=False))
    z = build.conv(x, 4, (3, 3), padding=(2, 2), dilation=(2, 2), groups=4, bias=False)
    return head(build, build.add(y, build.norm(z)))


def concatenated() -> Program:
    """Branches side by side, and a 1x1 convolution over both."""
    build = Builder(7)
    x = build.input(4, 6, 6)
    y = build.cat(
        build.norm(build.conv(x, 4, (3, 3), padding=(1, 1))), build.norm(build.conv(x, 4, (1, 1)))
    )
    return head(build, build.conv(y, 4, (1, 1)))


def sliced() -> Program:
    """The two halves of a convolution's channels, subtracted with a factor."""
    build = Builder(8)
    y = build.conv(build.input(4, 6, 6), 8, (3, 3))
    a = build.call("slice.Tensor", self=y, dim=1, start=0, end=4)
    b = build.call("slice.Tensor", self=y, dim=1, start=4, end=8)
    return head(build, build.call("sub.Tensor", self=a, other=b, alpha=2))


def scaled() -> Program:
    """A convolution, a scaling vector, a shift, and a difference from a constant."""
    build = Builder(9)
    y = build.conv(build.input(4, 6, 6), 6, (3, 3), padding=(1, 1))
    y = build.call("mul.Tensor", self=y, other=build.uniform(6, 1, 1))
    y = build.call("sub.Tensor", self=build.normal(6, 1, 1), other=y)
    return head(build, build.call("div.Tensor", self=y, other=build.uniform(6, 1, 1)))


def cropped() -> Program:
    """Padded too much, then cropped (ACNet), asymmetrically."""
    build = Builder(10)
    x = build.input(4, 7, 7)
    y = build.conv(x, 4, (3, 3), padding=(2, 2), bias=False)
    y = build.call("pad", self=y, pad=(-1, -1, -2, 0))
    return head(build, build.norm(y))


def tokens() -> Program:
    """Linear layers on tokens with a scaling vector between them."""
    build = Builder(11)
    x = build.input(5, 6)
    y = build.call("linear", input=x, weight=build.normal(12, 6), bias=build.normal(12))
    y = build.call("mul.Tensor", self=y, other=build.uniform(12))
    y = build.call("linear", input=y, weight=build.normal(6, 12), bias=build.normal(6))
    return build.program(build.relu(build.add(x, y)))


def narrow() -> Program:
    """A network whose output hardly varies: its bias is 10,000 times what the input moves."""
    build = Builder(12)
    x = build.input(3, 8, 8)
    y = build.conv(x, 6, (3, 3), padding=(1, 1), bias=False)
    y = build.add(build.norm(y), build.norm(build.conv(x, 6, (1, 1), bias=False)))
    y = build.call("mean.dim", self=build.relu(y), dim=(2, 3))
    y = build.call("linear", input=y, weight=build.normal(5, 6, scale=1e-4), bias=build.normal(5))
    return build.program(y)


def padded_twice() -> Program:
    """Two padded 3x3 convolutions with nothing between: one convolution only away from borders."""
    build = Builder(13)
    x = build.input(1, 9, 9)
    y = build.conv(x, 8, (3, 3), padding=(1, 1), bias=False)
    return head(build, build.conv(y, 1, (3, 3), padding=(1, 1), bias=False))


def biased_border() -> Program:
    """A biased 1x1 convolution, then padding: the border misses the bias."""
    build = Builder(14)
    x = build.input(2, 7, 7)
    y = build.conv(x, 8, (1, 1))
    return head(build, build.conv(y, 2, (3, 3), padding=(1, 1)))


NETWORKS = {
    "repvgg": repvgg,
    "repvgg grouped": lambda: repvgg(groups=4),
    "repvgg strided": lambda: repvgg(stride=2),
    "acnet": acnet,
    "dbb": dbb,
    "dbb 5x5": lambda: dbb(groups=1, reach=2),
    "chain": chain,
    "spatial chain": spatial_chain,
    "dilated": dilated,
    "concatenated": concatenated,
    "sliced": sliced,
    "scaled": scaled,
    "cropped": cropped,
    "tokens": tokens,
    "narrow": narrow,
    "padded twice": padded_twice,
    "biased border": biased_border,
}
