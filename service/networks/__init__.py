"""Training-form networks as ordinary trainable modules, and recognising them by their keys."""

from __future__ import annotations

from service.networks.base import (
    Geometry,
    Reparameterizable,
    blocks_of,
    deploy_names,
    deploy_skeleton,
)
from service.networks.config import ModelConfig, Preprocessing, Requested, parse_changes
from service.networks.dbb import DiverseBranchBlock
from service.networks.mobilenet import MobileNetV1
from service.networks.parts import Part, find_parts
from service.networks.presets import PRESETS
from service.networks.recognition import (
    Recognition,
    build,
    known_names,
    make_network,
    recognise,
)
from service.networks.repvgg import RepVGG, RepVGGBlock, RepVGGplus
from service.networks.resnet import ResNet

__all__ = [
    "PRESETS",
    "DiverseBranchBlock",
    "Geometry",
    "MobileNetV1",
    "ModelConfig",
    "Part",
    "Preprocessing",
    "Recognition",
    "RepVGG",
    "RepVGGBlock",
    "RepVGGplus",
    "Reparameterizable",
    "Requested",
    "ResNet",
    "blocks_of",
    "build",
    "deploy_names",
    "deploy_skeleton",
    "find_parts",
    "known_names",
    "make_network",
    "parse_changes",
    "recognise",
]
