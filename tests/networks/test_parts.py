"""Blocks of known dialects inside networks that are not known."""

from __future__ import annotations

import torch
from torch import nn

from service.networks import ModelConfig, RepVGGBlock, build, deploy_names, find_parts
from service.networks.detectors import RepConv, RTDETRBlock, TwoKernels, YOLOv7RepConv
from service.networks.mobileone import MobileOneBlock
from service.networks.replknet import LargeKernelConv


class Detector(nn.Module):
    """An invented network that holds blocks of several projects beside layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.backbone = nn.ModuleList([RepVGGBlock(8, 8), RepVGGBlock(8, 16, stride=2)])
        self.neck = nn.ModuleDict({"up": RepConv(16, 16, identity=True), "norm": nn.BatchNorm2d(4)})
        self.head = nn.Sequential(YOLOv7RepConv(16, 8), MobileOneBlock(8, 8, 3, groups=8))
        self.mixer = LargeKernelConv(8, 8, 7, groups=8, small_kernel=3)


def test_blocks_are_found_with_their_paths_and_classes() -> None:
    state = Detector().state_dict()
    found = {part.path: part.recognition.network for part in find_parts(state)}
    assert found == {
        "backbone.0": "RepVGGBlock",
        "backbone.1": "RepVGGBlock",
        "neck.up": "RepConv",
        "head.0": "YOLOv7-RepConv",
        "head.1": "MobileOneBlock",
        "mixer": "ReparamLargeKernelConv",
    }


def test_a_block_builds_from_its_own_keys() -> None:
    state = Detector().state_dict()
    part = next(part for part in find_parts(state) if part.path == "neck.up")
    block = build(part.recognition, part.state(state))
    assert isinstance(block, TwoKernels)
    assert deploy_names(block) == {"": "conv"}
    assert block.get_submodule("conv1.bn").eps == 1e-3


def test_the_config_gives_values_to_every_block_of_a_class() -> None:
    state = Detector().state_dict()
    config = ModelConfig(architecture={"name": "RepVGGBlock", "eps": 1e-3})
    parts = [p for p in find_parts(state, config) if p.recognition.network == "RepVGGBlock"]
    assert [part.recognition.hyperparameters["eps"] for part in parts] == [1e-3, 1e-3]


def test_a_network_without_blocks_has_none() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    assert find_parts(plain.state_dict()) == ()


def test_a_damaged_block_is_no_part() -> None:
    state = Detector().state_dict()
    state["neck.up.conv1.bn.weight"] = torch.zeros(3)
    del state["backbone.0.rbr_1x1.bn.bias"]
    paths = {part.path for part in find_parts(state)}
    assert paths == {"backbone.1", "head.0", "head.1", "mixer"}


def test_rtdetr_stores_its_branches_beside_the_layer() -> None:
    from service.networks import deploy_skeleton

    keys = set(deploy_skeleton(RTDETRBlock(4, 4)).state_dict())
    assert {"conv.weight", "conv.bias", "conv1.conv.weight", "conv2.norm.weight"} <= keys
