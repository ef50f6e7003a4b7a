"""What stands for a convolution with batch norm in the networks of several repositories."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.networks.acb import ACBlock
from service.networks.base import Geometry, Reparameterizable
from service.networks.blocks import ConvBN
from service.networks.dbb import DiverseBranchBlock
from service.networks.orepa import OREPA, OREPA1x1, OREPALarge, OREPARepVGGBlock

Unit = Callable[[Geometry, str | None], Reparameterizable]


@dataclass(frozen=True)
class UnitKind:
    """One kind of unit: `make(geometry, activation)` and how its keys look.

    `kernels` are the keys inside a unit, in either form, whose shape is (out, in / groups, K, K).
    `signature` is a regular expression for how keys inside a unit begin, in either form.
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


def acb_unit(geometry: Geometry, act: str | None) -> Reparameterizable:
    """An asymmetric convolution block, or a plain unit where `dbb_unit` would use one."""
    size = plain_or_size(geometry)
    if size is None:
        return ConvBN(geometry, act=act)
    io = (geometry.in_channels, geometry.out_channels)
    return ACBlock(*io, size, geometry.stride, groups=geometry.groups, act=act)


def orepa_unit(geometry: Geometry, act: str | None) -> Reparameterizable:
    """The OREPA block for the kernel size: 1x1, up to 5x5, or composed of 3x3 from 7x7 on."""
    size, stride, groups = geometry.kernel_size, geometry.stride, geometry.groups
    io = (geometry.in_channels, geometry.out_channels)
    if size == 1:
        return OREPA1x1(*io, stride, act=act)
    if not isinstance(size, int):
        return ConvBN(geometry, act=act)
    kind = OREPALarge if size >= 7 else OREPA
    return kind(*io, size, stride, groups=groups, act=act)


def orepa_vgg_unit(geometry: Geometry, act: str | None) -> Reparameterizable:
    """RepVGG's block with an OREPA 3x3 branch, or a plain unit for other kernels."""
    if geometry.kernel_size != 3:
        return ConvBN(geometry, act=act)
    io = (geometry.in_channels, geometry.out_channels)
    return OREPARepVGGBlock(*io, stride=geometry.stride, groups=geometry.groups, act=act)


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
    "acb": UnitKind(
        family="acnet",
        title="ACB",
        make=acb_unit,
        kernels=("square_conv.weight", "fused_conv.weight", "conv.weight"),
        signature=r"((square|ver|hor)_(conv|bn)|fused_conv)\.",
    ),
    "orepa": UnitKind(
        family="orepa",
        title="OREPA",
        make=orepa_unit,
        kernels=(
            "weight_orepa_origin",
            "orepa_reparam.weight",
            "weight_or1x1_origin",
            "or1x1_reparam.weight",
            "or_large_reparam.weight",
            "weight0.weight_orepa_origin",
            "conv.weight",
        ),
        signature=r"(weight_orepa_|orepa_reparam\.|weight_or1x1_|or1x1_reparam\.)",
    ),
    "orepa_vgg": UnitKind(
        family="orepa",
        title="OREPA-RepVGG",
        make=orepa_vgg_unit,
        kernels=(
            "rbr_dense.weight_rbr_origin",
            "rbr_reparam.weight",
            "rbr_1x1.conv.weight",
            "conv.weight",
        ),
        signature=r"(rbr_dense\.weight_rbr_|rbr_reparam\.)",
    ),
    "base": UnitKind(
        family="plain",
        title="Plain",
        make=plain_unit,
        kernels=("conv.weight",),
        signature=r"(conv|bn)\.",
    ),
}
