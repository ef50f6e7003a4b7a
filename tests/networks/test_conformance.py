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
# What the keys cannot tell and the uploader must say.
SAID = {
    "replknet31b_small_deepfuse": {"network": "RepLKNet", "deep_fuse": True},
    "ecbsr": {"network": "ECBSR", "with_idt": True},
}
BLOCKS = {
    "blk_acb": "ACBlock",
    "blk_orepa_k": "OREPA",
    "blk_orepa_odd": "OREPA",
    "blk_orepa_1x1": "OREPA_1x1",
    "blk_orepa_large": "OREPA_LargeConv",
    "blk_orepa_vgg": "RepVGGBlock_OREPA",
    "blk_yolov7_repconv_orepa": "RepVGGBlock_OREPA",
    "blk_mobileone": "MobileOneBlock",
    "blk_fastvit_lkb": "ReparamLargeKernelConv",
    "blk_fastvit_repcpe": "RepCPE",
    "blk_fastvit_repmixer": "RepMixer",
    "blk_unirep_dilated": "DilatedReparamBlock",
    "blk_ecb": "ECB",
    "blk_yolov6_qarepvgg": "YOLOv6-QARepVGGBlock",
    "blk_repvit_bn_linear": "BN_Linear",
    "blk_repvit_repvggdw": "RepVGGDW",
    "blk_timm_repvggdw_legacy": "RepVGGDW",
    "blk_yolov9_repconvn": "RepConv",
    "blk_ultralytics_repconv": "RepConv",
    "blk_rtdetr": "RTDETR-RepVggBlock",
    "blk_yolov10_repvggdw": "YOLOv10-RepVGGDW",
    "blk_yolov7_repconv": "YOLOv7-RepConv",
    "blk_yolov7_implicit": "YOLOv7-ImplicitHead",
    "blk_sg_qarepvgg": "SG-QARepVGGBlock",
    "blk_sg_repvgg": "SG-RepVGGBlock",
    "blk_yolov6_linearadd": "YOLOv6-LinearAddBlock",
}


def network_of(name: str) -> str:
    """The block class of a bare-block case: the longest prefix that the table has."""
    prefix = max((p for p in BLOCKS if name.startswith(p)), key=len)
    return BLOCKS[prefix]


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
    said = next((said for prefix, said in SAID.items() if name.startswith(prefix)), {})
    recognition, module = cases.built(name, **said)
    assert recognition.name == NETWORKS[name]
    assert recognition.form == "train"
    assert cases.error_f64(name, module) < 1e-10
    check_deploy_form(name, recognition, module)


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*BLOCKS))
def test_bare_blocks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name, network_of(name))
    assert recognition.name == network_of(name)
    assert cases.error_f64(name, module) < 1e-10
    check_deploy_form(name, recognition, module)


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*BLOCKS))
def test_a_wrong_eps_is_seen(name: str) -> None:
    eps = cases.load(name)["attrs"].get("eps")
    if eps is None:
        pytest.skip("the block has no batch norm")
    _, module = cases.built(name, network_of(name), eps=1e-5 if eps == 1e-3 else 1e-3)
    assert cases.error_f64(name, module) > 1e-6
