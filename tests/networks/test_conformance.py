"""Every other family against the outputs and deploy keys of its official code."""

from __future__ import annotations

import pytest
from torch import nn

from service.networks import deploy_names, deploy_skeleton
from tests.networks import cases

NETWORKS = {
    "acb_resnet18": "ACB-ResNet-18",
    "acb_resnet50": "ACB-ResNet-50",
    "orepa_resnet18": "OREPA-ResNet-18",
    "orepa_resnet50": "OREPA-ResNet-50",
    "orepa_base_resnet18": "Plain-ResNet-18",
    "orepa_vgg_a0": "OREPA-RepVGG-A0",
}
BLOCKS = {
    "blk_acb": "ACBlock",
    "blk_orepa_k": "OREPA",
    "blk_orepa_odd": "OREPA",
    "blk_orepa_1x1": "OREPA_1x1",
    "blk_orepa_large": "OREPA_LargeConv",
    "blk_orepa_vgg": "RepVGGBlock_OREPA",
    "blk_yolov7_repconv_orepa": "RepVGGBlock_OREPA",
}


def network_of(name: str) -> str:
    """The block class of a bare-block case: the longest prefix that the table has."""
    prefix = max((p for p in BLOCKS if name.startswith(p)), key=len)
    return BLOCKS[prefix]


def check_deploy_form(name: str, module: nn.Module) -> None:
    skeleton = deploy_skeleton(module)
    if cases.load(name).get("deploy_state"):
        found = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
        assert found == cases.deploy_shapes(name)
    owned = set(skeleton.state_dict())
    for prefix in deploy_names(module).values():
        assert {f"{prefix}.weight" if prefix else "weight"} <= owned


@cases.needs_cases
@pytest.mark.parametrize("name", [n for n in NETWORKS if n in cases.names(n)])
def test_networks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name)
    assert recognition.name == NETWORKS[name]
    assert recognition.form == "train"
    assert cases.error_f64(name, module) < 1e-10
    check_deploy_form(name, module)


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*BLOCKS))
def test_bare_blocks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name, network_of(name))
    assert recognition.name == network_of(name)
    assert cases.error_f64(name, module) < 1e-10
    check_deploy_form(name, module)


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*BLOCKS))
def test_a_wrong_eps_is_seen(name: str) -> None:
    eps = cases.load(name)["attrs"]["eps"]
    _, module = cases.built(name, network_of(name), eps=1e-5 if eps == 1e-3 else 1e-3)
    assert cases.error_f64(name, module) > 1e-6
