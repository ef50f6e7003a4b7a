"""Every other family against the outputs and deploy keys of its official code."""

from __future__ import annotations

import pytest
from torch import nn

from service.networks import Recognition, deploy_names, deploy_skeleton
from tests.networks import cases

NETWORKS = {
    "acb_resnet18": "ACB-ResNet-18",
    "acb_resnet50": "ACB-ResNet-50",
    "orepa_resnet18": "OREPA-ResNet-18",
    "orepa_resnet50": "OREPA-ResNet-50",
    "orepa_base_resnet18": "Plain-ResNet-18",
    "orepa_vgg_a0": "OREPA-RepVGG-A0",
    "acnet_cfqkbnc": "ACNet-CFQKBN",
    "acnet_vc": "ACNet-VGG-16",
    "acnet_src56": "ACNet-SRC-56",
    "acnet_sres18": "ACNet-ResNet-18",
    "mobileone_s0": "MobileOne-s0",
    "mobileone_s1": "MobileOne-s1",
    "mm_mobileone_s0": "MobileOne-s0",
    "mm_mobileone_s4": "MobileOne-s4",
    "mm_repvgg_a0": "RepVGG-A0",
    "timm_repvgg_a0": "RepVGG-A0",
    "timm_repvgg_d2se": "RepVGG-D2se",
    "timm_mobileone_s0": "MobileOne-s0",
    "timm_fastvit_t8": "FastViT-T8",
    "timm_fastvit_sa12": "FastViT-SA12",
    "fastvit_apple_t8": "FastViT-T8",
    "replknet31b": "RepLKNet-31B",
    "replknet31b_small_deepfuse": "RepLKNet (custom)",
    "unireplknet_a": "UniRepLKNet-A",
    "qarepvgg_v2_a0": "QARepVGG-A0",
    "ecbsr_m2c8_x4_idt": "ECBSR",
    "repghost_0_5x": "RepGhostNet-0.5x",
    "timm_repghostnet_050": "RepGhostNet-0.5x",
    "repvit_thu_m0_9": "RepViT-M0.9",
    "timm_repvit_m0_9": "RepViT-M0.9 (distilled)",
    "timm_levit_128s": "LeViT-128S",
    "timm_efficientvit_m0": "EfficientViT-M0",
}


def check_deploy_form(name: str, recognition: Recognition, module: nn.Module) -> None:
    skeleton = deploy_skeleton(module)
    if cases.load(name).get("deploy_state"):
        own = skeleton.state_dict()
        found = {recognition.public_key(key): tuple(own[key].shape) for key in own}
        assert found == cases.deploy_shapes(name)
    owned = set(skeleton.state_dict())
    for prefix in deploy_names(module).values():
        assert {f"{prefix}.weight" if prefix else "weight"} <= owned


@cases.needs_cases
@pytest.mark.parametrize("name", [n for n in NETWORKS if n in cases.names(n)])
def test_networks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name, **cases.said(name))
    assert recognition.name == NETWORKS[name]
    assert recognition.form == "train"
    assert cases.error_f64(name, module) < 1e-10
    check_deploy_form(name, recognition, module)


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*cases.BLOCKS))
def test_bare_blocks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name, cases.network_of(name))
    assert recognition.name == cases.network_of(name)
    assert cases.error_f64(name, module) < 1e-10
    check_deploy_form(name, recognition, module)


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*cases.BLOCKS))
def test_a_wrong_eps_is_seen(name: str) -> None:
    eps = cases.load(name)["attrs"].get("eps")
    if eps is None:
        pytest.skip("the block has no batch norm")
    _, module = cases.built(name, cases.network_of(name), eps=1e-5 if eps == 1e-3 else 1e-3)
    assert cases.error_f64(name, module) > 1e-6
