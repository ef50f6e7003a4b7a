"""Every conformance case through the engine: errors, counts and deploy tensors; none is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conformance.measure import Counts, measure
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


@cases.needs_cases
def test_no_case_is_left_out() -> None:
    assert len(NAMES) == len(list(cases.FOLDER.glob("*.json"))) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_case_is_converted_at_least_as_well_as_officially(name: str) -> None:
    row = measure(name)
    assert list(row.failures()) == []
    assert row.network == (cases.network_of(name) or NETWORKS.get(name, row.network))


@cases.needs_cases
def test_a_worse_conversion_fails() -> None:
    row = measure("blk_dbb_k3")
    assert row.official is not None
    assert not list(row.failures())
    more = Counts(row.official.convolutions + 1, row.official.macs + 1)
    assert len(list(replace(row, after=more).failures())) == 2
    assert list(replace(row, float64=2e-10).failures())
    assert list(replace(row, float64=float("nan")).failures())
    assert list(replace(row, float32=11 * row.noise).failures())
    assert list(replace(row, tensors=1e-5).failures())
    assert list(replace(row, tensors=None).failures())
