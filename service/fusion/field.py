"""Bias fields: what an affine form adds at every output position, constant but near the border.

A convolution's bias is one number a channel. In the middle of a multi-branch block it need not be:
zero padding after a biased layer makes the border differ. A field keeps that difference exactly,
and cheaply: along each axis it stores `low` border entries, one interior entry, `high` border
entries; or every entry, where the axis is shorter than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CONSTANT_TOLERANCE = 1e-12
"""How far border entries may lie from the interior, relative to the field's largest entry, and
still be the float64 rounding of the same number."""


@dataclass(frozen=True)
class Field:
    """`values` is float64 `[C, m_1, …, m_n]`; axis i describes `size[i]` positions.

    `m_i == size[i]` stores every position; otherwise `m_i == low[i] + 1 + high[i]` and entry
    `low[i]` stands for the whole interior.
    """

    values: Tensor
    low: tuple[int, ...]
    high: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def constant(vector: Tensor, size: Sequence[int]) -> Field:
        """The field that is `vector` (`[C]`) everywhere on a map of `size` positions."""
        none = (0,) * len(size)
        values = vector.reshape(-1, *[1] * len(size))
        return Field(values, none, none, tuple(size))

    @property
    def interior(self) -> Tensor:
        """The interior value of every channel, `[C]`; the central position where all are stored."""
        index: tuple[int, ...] = tuple(
            low if m == low + 1 + high else m // 2
            for m, low, high in zip(self.values.shape[1:], self.low, self.high, strict=True)
        )
        return self.values.movedim(0, -1)[index]

    def is_constant(self) -> bool:
        """Whether border and interior agree up to float64 rounding."""
        interior = self.interior.reshape(-1, *[1] * len(self.size))
        scale = float(self.values.abs().amax()) if self.values.numel() else 0.0
        deviation = float((self.values - interior).abs().amax()) if self.values.numel() else 0.0
        return deviation <= CONSTANT_TOLERANCE * scale

    def is_zero(self) -> bool:
        """Whether every stored entry is exactly zero, the border's included."""
        return not bool(self.values.any())

    def map(self, function: Callable[[Tensor], Tensor]) -> Field:
        """Apply a pointwise or channel-wise function of `[C, …]` entries."""
        return Field(function(self.values), self.low, self.high, self.size)

    def scaled(self, scale: Tensor, shift: Tensor) -> Field:
        """`scale * self + shift`, both `[C]`."""
        shape = (-1, *[1] * len(self.size))
        return self.map(lambda values: values * scale.reshape(shape) + shift.reshape(shape))

    def expanded(self, size: Sequence[int]) -> Tensor:
        """Entries of the same field on a map of `size` positions, `[C, *size]`.

        `size` may be smaller than `self.size` as long as every stored entry still has its place.
        """
        values = self.values
        for axis, target in enumerate(size):
            stored = values.shape[axis + 1]
            if stored == target:
                continue
            repeats = torch.ones(stored, dtype=torch.int64)
            repeats[self.low[axis]] = target - stored + 1
            values = values.repeat_interleave(repeats, dim=axis + 1)
        return values

    def widened(self, low: Sequence[int], high: Sequence[int]) -> Field:
        """The same field stored with margins of at least `low` and `high`."""
        low = tuple(max(a, b) for a, b in zip(self.low, low, strict=True))
        high = tuple(max(a, b) for a, b in zip(self.high, high, strict=True))
        stored = self.values.shape[1:]
        target = [
            n if m == n else min(n, lo + 1 + hi)
            for n, m, lo, hi in zip(self.size, stored, low, high, strict=True)
        ]
        return Field(self.expanded(target), low, high, self.size)

    def added(self, other: Field, sign: float = 1.0) -> Field:
        """`self + sign * other` on maps of equal size."""
        a = self.widened(other.low, other.high)
        b = other.widened(self.low, self.high)
        size = [max(m, n) for m, n in zip(a.values.shape[1:], b.values.shape[1:], strict=True)]
        values = a.expanded(size) + sign * b.expanded(size)
        return Field(values, a.low, a.high, self.size).trimmed()

    def padded(self, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Field:
        """A border of `value`, or a crop where an amount is negative."""
        crop_low = [max(0, -n) for n in before]
        crop_high = [max(0, -n) for n in after]
        wide = self.widened(crop_low, crop_high)
        pads = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
        values = F.pad(wide.values, pads, value=value) if pads else wide.values
        low = tuple(max(0, lo + n) for lo, n in zip(wide.low, before, strict=True))
        high = tuple(max(0, hi + n) for hi, n in zip(wide.high, after, strict=True))
        size = tuple(n + lo + hi for n, lo, hi in zip(self.size, before, after, strict=True))
        return Field(values, low, high, size).trimmed()

    def convolved(
        self,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
    ) -> Field:
        """The field after a zero-padded convolution without bias.

        `weight` is float64 `[C', C / groups, *k]`; `padding` is (before, after) for every axis.
        Computed on the smallest map on which border and interior stay apart.
        """
        extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
        size = tuple(
            (n + before + after - e) // s + 1
            for n, (before, after), e, s in zip(self.size, padding, extent, stride, strict=True)
        )
        unpadded = all(before <= 0 and after <= 0 for before, after in padding)
        if self.is_zero() or (unpadded and all(m == 1 for m in self.values.shape[1:])):
            kernel_sum = weight.flatten(2).sum(dim=2) if size else weight
            return Field.constant(_grouped_product(kernel_sum, self.interior, groups), size)
        small = [
            self._virtual(axis, extent[axis], stride[axis], padding[axis])
            for axis in range(len(self.size))
        ]
        pads = [n for pair in reversed(padding) for n in pair]
        values = _CONVOLUTIONS[len(size)](
            F.pad(self.expanded(small), pads),
            weight,
            stride=tuple(stride),
            dilation=tuple(dilation),
            groups=groups,
        )
        low, high = [], []
        for axis, (before, _) in enumerate(padding):
            out = values.shape[axis + 1]
            last = (small[axis] - self.high[axis] - extent[axis] + before) // stride[axis]
            low.append(max(0, math.ceil((self.low[axis] + before) / stride[axis])))
            high.append(max(0, out - 1 - last))
            if small[axis] < self.size[axis]:
                values = _compressed(values, axis + 1, low[axis], high[axis])
        return Field(values, tuple(low), tuple(high), size).trimmed()

    def _virtual(self, axis: int, extent: int, stride: int, padding: tuple[int, int]) -> int:
        """A map size with the same border behaviour as the true one, and as small as can be."""
        before, after = padding
        enough = max(self.low[axis], -before) + max(self.high[axis], -after) + extent + 2 * stride
        true = self.size[axis]
        if self.values.shape[axis + 1] == true or enough >= true:
            return true
        return enough + (true - enough) % stride

    def trimmed(self) -> Field:
        """The same field with the margins that only repeat the interior removed."""
        values, low, high = self.values, list(self.low), list(self.high)
        tolerance = CONSTANT_TOLERANCE * (float(values.abs().amax()) if values.numel() else 0.0)
        for axis, size in enumerate(self.size):
            stored = values.shape[axis + 1]
            centre = low[axis] if stored == low[axis] + 1 + high[axis] else stored // 2
            middle = values.narrow(axis + 1, centre, 1)
            other = tuple(d for d in range(values.dim()) if d != axis + 1)
            same = ((values - middle).abs().amax(dim=other) <= tolerance).tolist()
            lo = next((i for i in range(centre, -1, -1) if not same[i]), -1) + 1
            hi = stored - next((i for i in range(centre, stored) if not same[i]), stored)
            if lo + 1 + hi < min(stored, size) or (stored == size and lo + 1 + hi < size):
                values = torch.cat(
                    [
                        values.narrow(axis + 1, 0, lo),
                        middle,
                        values.narrow(axis + 1, stored - hi, hi),
                    ],
                    dim=axis + 1,
                )
                low[axis], high[axis] = lo, hi
        return Field(values, tuple(low), tuple(high), self.size)


def _compressed(values: Tensor, dim: int, low: int, high: int) -> Tensor:
    """Keep `low` entries, one of the interior, and `high` entries along `dim`."""
    length = values.shape[dim]
    return torch.cat(
        [values.narrow(dim, 0, low + 1), values.narrow(dim, length - high, high)], dim=dim
    )


def _grouped_product(matrix: Tensor, vector: Tensor, groups: int) -> Tensor:
    """`[O, C / groups]` by `[C]`, group by group, as a `[O]` vector."""
    grouped = matrix.reshape(groups, -1, matrix.shape[1])
    return torch.einsum("goc,gc->go", grouped, vector.reshape(groups, -1)).reshape(-1)


def _pointwise(x: Tensor, weight: Tensor, *, groups: int, **_: object) -> Tensor:
    return _grouped_product(weight, x, groups)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {
    0: _pointwise,
    1: F.conv1d,
    2: F.conv2d,
    3: F.conv3d,
}
