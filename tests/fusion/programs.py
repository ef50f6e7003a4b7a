"""Random programs for property tests: linear branches, blocks as papers draw them, and the rest.

Every choice is drawn through `Draw`, so that hypothesis can shrink a program that fails; numbers of
weights come from a seed. Values keep a scale near one, so that errors may be read as relative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from hypothesis import strategies as st

from service.graph.program import Program, Ref
from tests.graph.builder import Builder

T = TypeVar("T")
MAX_AXIS = 9
"""Longest spatial axis that is generated."""


@dataclass(frozen=True)
class Draw:
    """Choices, from hypothesis."""

    data: Callable[..., int]

    def number(self, low: int, high: int) -> int:
        return self.data(st.integers(low, high))

    def one(self, options: Sequence[T]) -> T:
        return options[self.number(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        """True in about `percent` of a hundred cases; shrinks towards False."""
        return self.number(0, 99) >= 100 - percent

    def each(self, rank: int, low: int, high: int) -> tuple[int, ...]:
        """A number an axis, often the same on all."""
        if self.chance(40):
            return tuple(self.number(low, high) for _ in range(rank))
        return (self.number(low, high),) * rank


@dataclass(frozen=True)
class Branch:
    """What every branch of a block has in common: with padding `reach` all have one output size."""

    out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    reach: tuple[int, ...]
    groups: int


class Skip(Exception):
    """The drawn step does not fit the drawn value; another is drawn."""


class Writer:
    """One random program of channels-first values with `rank` spatial axes."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.rank = draw.one((2, 2, 1, 3))
        self.build = Builder(seed=draw.number(0, 1 << 16))
        largest = 5 if self.rank == 3 else MAX_AXIS
        sizes = draw.each(self.rank, 1, largest)
        self.values = [self.build.input(draw.number(1, 6), *sizes)]
        if draw.chance(15):
            self.values.append(self.build.input(draw.number(1, 4), *sizes))

    # Looking at values --------------------------------------------------------------------------

    def channels(self, x: Ref) -> int:
        size = self.build.shape(x)[1]
        assert size is not None
        return size

    def size(self, x: Ref) -> tuple[int, ...]:
        return tuple(n for n in self.build.shape(x)[2:] if n is not None)

    def operand(self) -> Ref:
        """A value to read: mostly the newest, sometimes one that others read already."""
        if self.draw.chance(30):
            return self.draw.one(self.values)
        return self.values[-1]

    def partner(self, x: Ref) -> Ref:
        """A value of the same shape as `x`, which may be `x` itself."""
        same = [v for v in self.values if self.build.shape(v) == self.build.shape(x)]
        return self.draw.one(same)

    # Steps --------------------------------------------------------------------------------------

    def convolution(self, x: Ref) -> Ref:
        draw, channels = self.draw, self.channels(x)
        groups = draw.one([g for g in range(1, channels + 1) if channels % g == 0])
        kernel = draw.each(self.rank, 1, 3)
        dilation = draw.each(self.rank, 1, 2)
        out = groups * draw.number(1, max(1, 6 // groups))
        bias = draw.chance(60)
        if draw.chance(15):
            return self.build.conv(
                x, out, kernel, padding="same", dilation=dilation, groups=groups, bias=bias
            )
        padding, stride = draw.each(self.rank, 0, 2), draw.each(self.rank, 1, 2)
        self.fits(x, kernel, padding, dilation)
        return self.build.conv(
            x,
            out,
            kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )

    def fits(
        self,
        x: Ref,
        kernel: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] | None = None,
    ) -> None:
        dilation = dilation or (1,) * self.rank
        axes = zip(self.size(x), kernel, padding, dilation, strict=True)
        if any(n + 2 * p < (k - 1) * d + 1 for n, k, p, d in axes):
            raise Skip

    def pointwise(self, x: Ref) -> Ref:
        channels = self.channels(x)
        out = channels if self.draw.chance(60) else self.draw.number(1, 6)
        return self.build.conv(x, out, (1,) * self.rank, bias=self.draw.chance(50))

    def norm(self, x: Ref) -> Ref:
        eps = self.draw.one((1e-5, 1e-3, 0.1))
        return self.build.norm(x, eps=eps, affine=self.draw.chance(80))

    def average(self, x: Ref) -> Ref:
        draw = self.draw
        kernel = draw.each(self.rank, 1, 3)
        padding = tuple(draw.number(0, k // 2) for k in kernel)
        self.fits(x, kernel, padding)
        more: dict[str, int | None] = {}
        if self.rank > 1:
            more["divisor_override"] = draw.one((None, None, 3))
        return self.build.call(
            f"avg_pool{self.rank}d",
            self=x,
            kernel_size=kernel,
            stride=draw.one((kernel, draw.each(self.rank, 1, 2), ())),
            padding=padding,
            ceil_mode=draw.chance(25),
            count_include_pad=draw.chance(80),
            **more,
        )

    def maximum(self, x: Ref) -> Ref:
        kernel = self.draw.each(self.rank, 1, 2)
        self.fits(x, kernel, (0,) * self.rank)
        stride = self.draw.each(self.rank, 1, 2)
        return self.build.call(f"max_pool{self.rank}d", self=x, kernel_size=kernel, stride=stride)

    def pad(self, x: Ref) -> Ref:
        draw = self.draw
        low = -1 if draw.chance(30) else 0
        amounts = tuple(draw.number(low, 2) for _ in range(2 * self.rank))
        pairs = zip(amounts[-2::-2], amounts[::-2], strict=True)
        if any(n + a + b < 1 for n, (a, b) in zip(self.size(x), pairs, strict=True)):
            raise Skip
        if draw.chance(50):
            value = draw.one((0.0, 0.0, 0.5, None))
            return self.build.call("pad", self=x, pad=amounts, mode="constant", value=value)
        value = draw.one((0.0, 0.0, 0.5))
        return self.build.call("constant_pad_nd", self=x, pad=amounts, value=value)

    def reflect(self, x: Ref) -> Ref:
        if self.rank == 3 or any(n < 2 for n in self.size(x)):
            raise Skip
        return self.build.call("pad", self=x, pad=(1,) * (2 * self.rank), mode="reflect")

    def crop(self, x: Ref) -> Ref:
        draw = self.draw
        axis = draw.number(1, self.rank + 1)
        length = self.build.shape(x)[axis] or 1
        start = draw.number(0, length - 1)
        end = draw.one((draw.number(start + 1, length), (1 << 63) - 1))
        if draw.chance(30):
            start -= length
        step = draw.one((1, 1, 1, 2)) if axis > 1 or draw.chance(20) else 1
        return self.build.call("slice.Tensor", self=x, dim=axis, start=start, end=end, step=step)

    def halves(self, x: Ref) -> Ref:
        """Two channel slices, treated apart and put together again."""
        channels = self.channels(x)
        if channels < 2:
            raise Skip
        cut = self.draw.number(1, channels - 1)
        parts = [
            self.build.call("slice.Tensor", self=x, dim=1, start=start, end=end, step=1)
            for start, end in ((0, cut), (cut, channels))
        ]
        if self.draw.chance(50):
            parts[0] = self.norm(parts[0])
        if self.draw.chance(50):
            parts[1] = self.build.conv(parts[1], channels - cut, (1,) * self.rank)
        if self.draw.chance(30):
            parts.reverse()
        return self.build.cat(*parts)

    def concatenate(self, x: Ref) -> Ref:
        size = self.size(x)
        parts = [v for v in self.values if self.size(v) == size]
        chosen = [x] + [self.draw.one(parts) for _ in range(self.draw.number(1, 2))]
        if sum(self.channels(v) for v in chosen) > 12:
            raise Skip
        dim = 1 - self.rank - 2 if self.draw.chance(20) else 1
        return self.build.cat(*chosen, dim=dim)

    def combine(self, x: Ref) -> Ref:
        op = self.draw.one(("add.Tensor", "add.Tensor", "sub.Tensor"))
        alpha = self.draw.one((1, 1, 1, 0.5, 2))
        return self.build.call(op, self=x, other=self.partner(x), alpha=alpha)

    def broadcast(self, x: Ref) -> Ref:
        """The sum of a value and its own mean over the map, which broadcasts."""
        axes = tuple(range(2, self.rank + 2))
        mean = self.build.call("mean.dim", self=x, dim=axes, keepdim=True)
        return self.build.add(x, self.draw.one((mean, self.build.conv(mean, 1, (1,) * self.rank))))

    def constant(self, x: Ref, *, field: bool) -> Ref:
        channels, ones = self.channels(x), (1,) * self.rank
        if field and self.draw.chance(25):
            return self.build.uniform(1, channels, *self.size(x))
        if self.draw.chance(20):
            return self.build.uniform(1)
        return self.build.uniform(*self.draw.one(((1,), ())), channels, *ones)

    def scale(self, x: Ref) -> Ref:
        draw = self.draw
        if draw.chance(30):
            op = draw.one(("mul.Scalar", "div.Scalar"))
            return self.build.call(op, self=x, other=draw.one((0.5, -1.5, 2)))
        constant = self.constant(x, field=True)
        if draw.chance(30):
            return self.build.call("div.Tensor", self=x, other=constant)
        pair = (x, constant) if draw.chance(50) else (constant, x)
        return self.build.call("mul.Tensor", self=pair[0], other=pair[1])

    def shift(self, x: Ref) -> Ref:
        draw = self.draw
        alpha = draw.one((1, 1, 2, -0.5))
        if draw.chance(30):
            op = draw.one(("add.Scalar", "sub.Scalar", "rsub.Scalar"))
            return self.build.call(op, self=x, other=draw.one((0.5, -1.5)), alpha=alpha)
        op = draw.one(("add.Tensor", "sub.Tensor"))
        constant = self.constant(x, field=True)
        pair = (x, constant) if draw.chance(50) else (constant, x)
        return self.build.call(op, self=pair[0], other=pair[1], alpha=alpha)

    def same(self, x: Ref) -> Ref:
        op = self.draw.one(("neg", "clone", "alias", "detach", "dropout"))
        if op == "dropout":
            return self.build.call("dropout", input=x, p=0.5, train=False)
        return self.build.call(op, self=x)

    def opaque(self, x: Ref) -> Ref:
        op = self.draw.one(("relu", "relu", "sigmoid", "gelu", "gate"))
        if op == "gate":
            axes = tuple(range(2, self.rank + 2))
            mean = self.build.call("mean.dim", self=x, dim=axes, keepdim=True)
            gate = self.build.call("sigmoid", self=mean)
            return self.build.call("mul.Tensor", self=x, other=gate)
        return self.build.call(op, self=x)

    # Blocks -------------------------------------------------------------------------------------

    def block(self, x: Ref) -> Ref:
        """Branches that one convolution equals, as RepVGG, ACNet and Diverse Branch Block do it."""
        draw, channels = self.draw, self.channels(x)
        reach = draw.each(self.rank, 0, 1)
        groups = draw.one([g for g in range(1, channels + 1) if channels % g == 0])
        same = draw.chance(60)
        want = Branch(
            out=channels if same else groups * draw.number(1, 2),
            kernel=tuple(2 * r + 1 for r in reach),
            stride=draw.each(self.rank, 1, 2),
            reach=reach,
            groups=groups,
        )
        total = self.full(x, want)
        for _ in range(draw.number(1, 3)):
            branch = draw.one((self.point, self.flat, self.averaged, self.sequence))
            total = self.build.add(total, branch(x, want))
        if want.out == channels and all(s == 1 for s in want.stride) and draw.chance(60):
            total = self.build.add(total, self.build.norm(x) if draw.chance(70) else x)
        return total

    def full(self, x: Ref, want: Branch) -> Ref:
        return self.spatial(x, want, want.kernel, want.reach)

    def point(self, x: Ref, want: Branch) -> Ref:
        return self.spatial(x, want, (1,) * self.rank, (0,) * self.rank)

    def flat(self, x: Ref, want: Branch) -> Ref:
        """A kernel that is 1 along one axis."""
        axis = self.draw.number(0, self.rank - 1)
        kernel = tuple(1 if i == axis else k for i, k in enumerate(want.kernel))
        reach = tuple(0 if i == axis else r for i, r in enumerate(want.reach))
        return self.spatial(x, want, kernel, reach)

    def spatial(self, x: Ref, want: Branch, kernel: tuple[int, ...], reach: tuple[int, ...]) -> Ref:
        y = self.build.conv(
            x,
            want.out,
            kernel,
            stride=want.stride,
            padding=reach,
            groups=want.groups,
            bias=self.draw.chance(30),
        )
        return self.build.norm(y)

    def averaged(self, x: Ref, want: Branch) -> Ref:
        """1x1, batch norm with a filled border, average pooling."""
        y = self.build.conv(x, want.out, (1,) * self.rank, groups=want.groups, bias=False)
        y = self.bordered(y, want.reach)
        none = (0,) * self.rank
        pool = f"avg_pool{self.rank}d"
        y = self.build.call(pool, self=y, kernel_size=want.kernel, stride=want.stride, padding=none)
        return self.build.norm(y)

    def sequence(self, x: Ref, want: Branch) -> Ref:
        """1x1, batch norm with a filled border, KxK."""
        inner = want.groups * self.draw.number(1, 2)
        y = self.build.conv(x, inner, (1,) * self.rank, groups=want.groups, bias=False)
        y = self.bordered(y, want.reach)
        y = self.build.conv(
            y, want.out, want.kernel, stride=want.stride, groups=want.groups, bias=False
        )
        return self.build.norm(y)

    def bordered(self, x: Ref, reach: Sequence[int]) -> Ref:
        """Batch norm, zero padding, and the border overwritten with the norm of zero by slices.

        Now and then the fill is another vector, so that border and interior differ.
        """
        build, eps = self.build, self.draw.one((1e-5, 1e-2))
        y = build.norm(x, eps=eps)
        weight, bias, mean, variance = (
            build.nodes[-1].args[key] for key in ("weight", "bias", "running_mean", "running_var")
        )
        if not any(reach):
            return y
        deviation = build.call(
            "sqrt", self=build.call("add.Scalar", self=variance, other=eps, alpha=1)
        )
        product = build.call("mul.Tensor", self=mean, other=weight)
        quotient = build.call("div.Tensor", self=product, other=deviation)
        fill = build.call("sub.Tensor", self=bias, other=quotient)
        if self.draw.chance(10):
            fill = mean
        fill = build.call("view", self=fill, size=(-1, *[1] * self.rank))
        y = build.call("pad", self=y, pad=tuple(n for r in reversed(reach) for n in (r, r)))
        for axis, amount in enumerate(reach, start=2):
            for start, end in ((0, amount), (-amount, (1 << 63) - 1)) if amount else ():
                part = build.call("slice.Tensor", self=y, dim=axis, start=start, end=end)
                value = build.call("copy", self=part, src=fill)
                y = build.call("slice_scatter", self=y, src=value, dim=axis, start=start, end=end)
        return y

    # The whole ----------------------------------------------------------------------------------

    STEPS: ClassVar[tuple[tuple[str, int], ...]] = (
        ("convolution", 5),
        ("pointwise", 4),
        ("norm", 5),
        ("block", 5),
        ("combine", 4),
        ("average", 2),
        ("pad", 2),
        ("crop", 2),
        ("halves", 1),
        ("concatenate", 2),
        ("scale", 2),
        ("shift", 2),
        ("same", 1),
        ("opaque", 2),
        ("maximum", 1),
        ("reflect", 1),
        ("broadcast", 1),
    )

    def step(self) -> None:
        choices = [name for name, weight in self.STEPS for _ in range(weight)]
        name = self.draw.one(choices)
        try:
            self.values.append(getattr(self, name)(self.operand()))
        except (Skip, RuntimeError):
            return  # the operator itself refuses, as average pooling does for some small maps

    def head(self) -> None:
        """What follows a backbone: pooled or flattened values through a linear layer."""
        x = self.values[-1]
        if self.draw.chance(50):
            x = self.build.call("mean.dim", self=x, dim=tuple(range(2, self.rank + 2)))
        else:
            x = self.build.call("flatten.using_ints", self=x, start_dim=1)
        width = self.build.shape(x)[1] or 1
        if self.draw.chance(50):
            x = self.build.norm(x)
        out = self.draw.number(1, 4)
        weight = self.build.normal(out, width, scale=width**-0.5)
        bias = self.build.normal(out) if self.draw.chance(50) else None
        x = self.build.call("linear", input=x, weight=weight, bias=bias)
        self.values.append(self.build.norm(x) if self.draw.chance(50) else x)

    def program(self) -> Program:
        """Steps, perhaps a head, and one to three outputs, the newest value among them."""
        for _ in range(self.draw.number(1, 7)):
            self.step()
        outputs = [self.values[-1]]
        while len(outputs) < 3 and self.draw.chance(15):
            outputs.append(self.draw.one(self.values))
        if self.draw.chance(20):
            self.head()
            outputs.insert(0, self.values[-1])
        return self.build.program(*outputs).pruned()


class Tokens:
    """One random program of channels-last values, `[N, C]` or `[N, T, C]`."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.build = Builder(seed=draw.number(0, 1 << 16))
        self.flat = draw.chance(40)
        tokens = () if self.flat else (draw.number(1, 4),)
        self.values = [self.build.input(*tokens, draw.number(1, 6))]

    def channels(self, x: Ref) -> int:
        return self.build.shape(x)[-1] or 1

    def linear(self, x: Ref) -> Ref:
        channels = self.channels(x)
        out = channels if self.draw.chance(60) else self.draw.number(1, 6)
        bias = self.build.normal(out, scale=0.5) if self.draw.chance(60) else None
        weight = self.build.normal(out, channels, scale=channels**-0.5)
        if self.draw.chance(70):
            return self.build.call("linear", input=x, weight=weight, bias=bias)
        matrix = self.build.call("t", self=weight)
        return self.build.call("matmul", self=x, other=matrix)

    def norm(self, x: Ref) -> Ref:
        """Batch norm over channels; tokens are flattened for it and put back, as LeViT does."""
        if self.flat:
            return self.build.norm(x)
        tokens, channels = self.build.shape(x)[1:]
        flat = self.build.call("flatten.using_ints", self=x, start_dim=0, end_dim=1)
        size = (-1, tokens, channels)
        return self.build.call("view", self=self.build.norm(flat), size=size)

    def combine(self, x: Ref) -> Ref:
        same = [v for v in self.values if self.build.shape(v) == self.build.shape(x)]
        op = self.draw.one(("add.Tensor", "sub.Tensor"))
        return self.build.call(op, self=x, other=self.draw.one(same), alpha=self.draw.one((1, 2)))

    def scale(self, x: Ref) -> Ref:
        return self.build.call("mul.Tensor", self=x, other=self.build.uniform(self.channels(x)))

    def shift(self, x: Ref) -> Ref:
        op = self.draw.one(("add.Tensor", "sub.Tensor"))
        constant = self.build.normal(self.channels(x))
        pair = (x, constant) if self.draw.chance(60) else (constant, x)
        return self.build.call(op, self=pair[0], other=pair[1])

    def slice(self, x: Ref) -> Ref:
        stop = self.draw.number(1, self.channels(x))
        start = self.draw.number(0, stop - 1)
        return self.build.call("slice.Tensor", self=x, dim=-1, start=start, end=stop)

    def concatenate(self, x: Ref) -> Ref:
        other = self.draw.one(self.values)
        if self.channels(x) + self.channels(other) > 12:
            return x
        return self.build.cat(x, other, dim=-1)

    def opaque(self, x: Ref) -> Ref:
        return self.build.call(self.draw.one(("relu", "gelu")), self=x)

    def program(self) -> Program:
        steps = [self.linear, self.linear, self.norm, self.combine, self.scale, self.shift]
        steps += [self.slice, self.concatenate, self.opaque]
        for _ in range(self.draw.number(1, 7)):
            x = self.draw.one(self.values) if self.draw.chance(25) else self.values[-1]
            self.values.append(self.draw.one(steps)(x))
        outputs = [self.values[-1]]
        if self.draw.chance(20):
            outputs.append(self.draw.one(self.values))
        return self.build.program(*outputs).pruned()


@st.composite
def programs(draw: Callable[..., int]) -> Program:
    """Random programs: mostly convolutional, some of linear layers."""
    chooser = Draw(draw)
    return Tokens(chooser).program() if chooser.chance(15) else Writer(chooser).program()
