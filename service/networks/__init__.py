"""Training-form networks as ordinary trainable modules, and recognising them by their keys."""

from __future__ import annotations

from service.networks.base import (
    Geometry,
    Reparameterizable,
    blocks_of,
    deploy_names,
    deploy_skeleton,
)
from service.networks.config import ModelConfig, Preprocessing, Requested
from service.networks.dbb import DiverseBranchBlock
from service.networks.mobilenet import MobileNetV1
from service.networks.parts import Part, find_parts
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
    "recognise",
]
