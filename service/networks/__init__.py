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
from service.networks.recognition import Recognition, build, known_names, recognise
from service.networks.repvgg import RepVGG, RepVGGBlock, RepVGGplus
from service.networks.resnet import ResNet

__all__ = [
    "DiverseBranchBlock",
    "Geometry",
    "MobileNetV1",
    "ModelConfig",
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
    "known_names",
    "recognise",
]
