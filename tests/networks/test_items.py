"""Variants that have no conformance case: from seeded weights to a fused network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.fusion import fuse
from service.graph import run
from service.networks import ModelConfig, RepVGG, build, known_names, make_network, recognise
from service.networks.acnet import MobileNet
from service.networks.repvgg import RepVGGplus
from service.networks.resnet import ResNet
from tests.networks.test_families import randomised

PUBLISHED = (
    "OREPA-ResNeXt-50",
    "DBB-ResNet-34",
    "DBB-ResNet-50",
    "RepVGG-B3g4",
    "RepVGG-D2se",
    "RepVGGplus-L2pse",
    "ACNet-MobileNet",
)
STEM = {"stem_width": 8, "stem_kernel": 3, "num_classes": 5}
GROUPED = {"planes": [16, 32], "groups": 4, "expansion": 2}
SMALL: dict[str, tuple[nn.Module, int]] = {
    # The network in small, and the convolutions that its deploy form runs.
    "OREPA-ResNeXt": (ResNet("orepa", "bottleneck", [1, 1], **GROUPED, **STEM), 9),
    "DBB-ResNet, basic": (ResNet("dbb", "basic", [2, 1], planes=[8, 12], **STEM), 8),
    "DBB-ResNet, bottleneck": (ResNet("dbb", "bottleneck", [1, 1], planes=[8, 12], **STEM), 9),
    "RepVGG, grouped": (RepVGG([1, 2], [8, 16], groups=4, num_classes=5), 4),
    "RepVGG, squeeze-and-excitation": (RepVGG([1, 2], [16, 32], se_ratio=8, num_classes=5), 12),
    "RepVGGplus": (RepVGGplus([1, 1, 2, 1], [8, 8, 16, 16], num_classes=5), 18),
    "ACNet-MobileNet": (MobileNet(8, [8, 16], num_classes=5), 5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_is_recognised_from_its_own_keys(name: str) -> None:
    assert name in known_names()
    with torch.device("meta"):
        state = make_network(name).state_dict()
    assert recognise(state).name == name


@pytest.mark.parametrize("name", SMALL)
def test_it_comes_back_from_its_checkpoint_and_fuses(name: str) -> None:
    module, convolutions = SMALL[name]
    state = randomised(module).eval().state_dict()
    recognition = recognise(state, ModelConfig(input_shape=(3, 32, 32)))
    assert recognition.form == "train"
    rebuilt = build(recognition, state).eval()
    x = torch.randn(2, 3, 32, 32)
    fusion = fuse(rebuilt, (x,))
    totals = fusion.report.totals
    assert totals.convolutions_after == convolutions
    assert totals.operators_after < totals.operators_before
    (fused,) = run(fusion.program_in("float64"), x.double())
    with torch.no_grad():
        expected = rebuilt.double()(x.double())
    assert float((fused - expected).norm() / expected.norm()) <= 1e-10
