"""Networks with in-place calls in their middle, and what those share memory with."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Step(nn.Module):
    """A network whose middle is given as a function."""

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self.conv(x))


def read_again(y: Tensor) -> Tensor:
    z = y * 2
    y.add_(1)
    return y + z  # y as changed, z from before


def through_detach(y: Tensor) -> Tensor:
    z = y.detach()
    z.mul_(3)
    return y + z


def view_of_the_result(y: Tensor) -> Tensor:
    z = y.relu_().flatten(1)
    return z.sub_(1)


def write_through_view(y: Tensor) -> Tensor:
    y[:, :2].mul_(0)
    return y


def view_read_late(y: Tensor) -> Tensor:
    z = y.transpose(1, 2)
    y.relu_()
    return z + 1


def whole_read_late(y: Tensor) -> Tensor:
    y.unbind(1)[0].relu_()
    return y + 1
