"""VGG-like networks in RepVGG's layout whose blocks are units: OREPA-RepVGG, DBB, ACB, OREPA."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from torch import nn

from service.networks.base import Geometry
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys
from service.networks.repvgg import REPVGG
from service.networks.units import UNITS, UnitKind
from service.networks.vgg import StagedVGG, read_staged


class UnitVGG(StagedVGG):
    """`StagedVGG` of 3x3 units with ReLU; `unit` is a key of `units.UNITS`."""

    def __init__(
        self,
        unit: str,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        stem_width: int | None = None,
        groups: int | Sequence[int] = 1,
        stem_stride: int = 2,
        strides: Sequence[int] | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
    ) -> None:
        kind = UNITS[unit]

        def block(inner: int, outer: int, stride: int, layer_groups: int) -> nn.Module:
            return kind.make(Geometry(inner, outer, 3, stride, 1, groups=layer_groups), "relu")

        stem = stem_width or min(64, widths[0])
        super().__init__(
            block, num_blocks, widths, stem, groups, stem_stride, strides, in_channels, num_classes
        )


def _read(kind: UnitKind, keys: Keys, hints: Values) -> Reading:
    reading = read_staged(keys, kind.kernels, "rbr_identity.")
    told = f"The blocks are {kind.title} units."
    assumed = "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository."
    return Reading(reading.values, (told, *reading.evidence), (*reading.assumed, assumed))


def _row(key: str, kind: UnitKind) -> Family:
    prefix = kind.title if key == "orepa_vgg" else f"{kind.title}-RepVGG"
    # What OREPA's form of RepVGG folds into is RepVGG itself, so RepVGG's row reads that.
    signature = r"rbr_dense\.weight_rbr_" if key == "orepa_vgg" else kind.signature
    published = {name: values for name, values in REPVGG.items() if "se_ratio" not in values}
    return Family(
        family=kind.family,
        network=prefix if key == "orepa_vgg" else f"{kind.title}-VGG",
        signature=re.compile(rf"^(stage0|stage[0-9]+\.[0-9]+)\.{signature}"),
        read=partial(_read, kind),
        make=partial(UnitVGG, key),
        named={name.replace("RepVGG", prefix): values for name, values in published.items()},
    )


ROWS = tuple(_row(key, kind) for key, kind in UNITS.items() if key != "base")
