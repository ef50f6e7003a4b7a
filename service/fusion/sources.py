"""The rules by which branches become one operator, and where each is published."""

from __future__ import annotations

from enum import Enum


class Rule(Enum):
    """A fusion rule and where it comes from."""

    CONV_BN = "conv-bn"
    ADDITION = "branch addition"
    SEQUENTIAL = "sequential convolutions"
    CONCATENATION = "depth concatenation"
    AVERAGE = "average pooling"
    MULTI_SCALE = "multi-scale kernels"
    IDENTITY = "identity branch"
    SCALE_SHIFT = "per-channel scale and shift"
    PADDING = "padding and cropping"
    BORDER = "border fill"
    DILATION = "dilated into dense"
    CHANNELS = "channel slices"
    LINEAR = "linear layers"
    PARAMETERS = "parameter-only folding"

    @property
    def source(self) -> str:
        """Paper and section, or the definition, from which the rule follows."""
        return _SOURCES[self]


_SOURCES = {
    Rule.CONV_BN: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform I",
    Rule.ADDITION: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform II",
    Rule.SEQUENTIAL: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform III",
    Rule.CONCATENATION: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform IV",
    Rule.AVERAGE: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform V",
    Rule.MULTI_SCALE: "Ding et al. 2021, Diverse Branch Block, §3.2 Transform VI; ACNet §3.3",
    Rule.IDENTITY: "Ding et al. 2021, RepVGG, §3.3",
    Rule.SCALE_SHIFT: "Hu et al. 2022, OREPA, §3.2 linear scaling layers",
    Rule.PADDING: "the definition of zero padding",
    Rule.BORDER: "Ding et al. 2021, Diverse Branch Block, §3.2 (padding after batch norm)",
    Rule.DILATION: "Ding et al. 2023, UniRepLKNet, §3.1",
    Rule.CHANNELS: "the definition of a convolution's channels",
    Rule.LINEAR: "a linear layer is a 1x1 convolution",
    Rule.PARAMETERS: "Hu et al. 2022, OREPA, §3.3 block squeezing",
}
