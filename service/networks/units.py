"""What stands for a convolution with batch norm in the networks of several repositories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvBN
from service.networks.dbb import DiverseBranchBlock

Unit = Callable[[Geometry, str | None], Reparameterizable]


@dataclass(frozen=True)
class UnitKind:
    """One kind of unit: `make(geometry, activation)` and how its keys look.

    `kernels` are the keys inside a unit, in either form, whose shape is (out, in / groups, K, K).
    `signature` is a regular expression for how keys inside a unit begin.
    """

    family: str
    title: str
    make: Unit
    kernels: tuple[str, ...]
    signature: str


def plain_unit(geometry: Geometry, act: str | None) -> Reparameterizable:
    """A convolution with batch norm, whatever the geometry."""
    return ConvBN(geometry, act=act)


def dbb_unit(geometry: Geometry, act: str | None) -> Reparameterizable:
    """A Diverse Branch Block, or a plain unit for the kernels that the repository leaves plain."""
    size = plain_or_size(geometry)
    if size is None:
        return ConvBN(geometry, act=act)
    return DiverseBranchBlock(
        geometry.in_channels,
        geometry.out_channels,
        size,
        stride=geometry.stride,
        groups=geometry.groups,
        act=act,
    )


def plain_or_size(geometry: Geometry) -> int | None:
    """The kernel size, or None for 1x1 and for 7x7 and up, which stay plain units."""
    size = geometry.kernel_size
    return size if isinstance(size, int) and 1 < size < 7 else None


UNITS: Mapping[str, UnitKind] = {
    "dbb": UnitKind(
        family="dbb",
        title="DBB",
        make=dbb_unit,
        kernels=("dbb_origin.conv.weight", "dbb_reparam.weight", "conv.weight"),
        signature=r"dbb_(origin|avg|1x1|1x1_kxk|reparam)\.",
    ),
    "base": UnitKind(
        family="plain",
        title="Plain",
        make=plain_unit,
        kernels=("conv.weight",),
        signature=r"(conv|bn)\.",
    ),
}
