"""The conformance table in parts, so that test processes share it: each case is in one of them."""

from __future__ import annotations

from tests.conformance.measure import measure
from tests.networks import cases

NAMES = cases.names("")
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


PARTS = 3


def part(number: int) -> list[str]:
    """The cases of part `number` (from 0): every third, the largest state dicts dealt first."""
    return sorted(NAMES, key=lambda name: (-len(cases.load(name)["state"]), name))[number::PARTS]


def check(name: str) -> None:
    """Fails where the case is not converted at least as well as officially, or not recognised."""
    row = measure(name)
    assert list(row.failures()) == []
    assert row.network == (cases.network_of(name) or NETWORKS.get(name, row.network))
