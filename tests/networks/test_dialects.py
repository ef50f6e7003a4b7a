"""Other projects' key names: there and back, in both forms, and refusals in their words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from service.errors import MissingKeys, MixedForm
from service.networks import RepVGG, build, deploy_skeleton, recognise
from service.networks.dialects import Renaming, renamed
from service.networks.fastvit import FastViT
from service.networks.mobileone import MobileOne
from tests.networks import cases

CASES = cases.names("timm_repvgg", "timm_mobileone", "timm_fastvit", "mm_")
TIMM = Renaming(
    (
        ("stem.", "stage0."),
        ("stages.0.", "stage1."),
        ("stages.1.", "stage2."),
        ("head.fc.", "linear."),
        (".conv_kxk.", ".rbr_dense."),
        (".conv_1x1.", ".rbr_1x1."),
        (".identity.", ".rbr_identity."),
        (".reparam_conv.", ".rbr_reparam."),
    )
)


@cases.needs_cases
@pytest.mark.parametrize("name", CASES)
def test_every_key_translates_there_and_back(name: str) -> None:
    recognition, module = cases.built(name)
    assert "names of this network" in recognition.evidence[0]
    theirs = set(cases.state_of(name))
    assert {recognition.public_key(key) for key in module.state_dict()} == theirs
    folded = deploy_skeleton(module).state_dict()
    assert {recognition.public_key(key) for key in folded} == set(cases.deploy_shapes(name))


@cases.needs_cases
@pytest.mark.parametrize("name", CASES)
def test_the_deploy_form_is_recognised_under_their_names(name: str) -> None:
    recognition, module = cases.built(name)
    folded = deploy_skeleton(module).state_dict()
    theirs = {recognition.public_key(key): tensor for key, tensor in folded.items()}
    again = recognise(theirs, cases.config_of(name))
    assert (again.network, again.form) == (recognition.network, "deploy")
    build(again, theirs)
    assert {again.public_key(key) for key in folded} == set(theirs)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    own = RepVGG([1, 2], [8, 16], num_classes=5).state_dict()
    return {TIMM.theirs(key): tensor for key, tensor in own.items()}


def test_a_refusal_names_their_keys(state: dict[str, Tensor]) -> None:
    assert recognise(state).network == "RepVGG"
    del state["stages.1.1.conv_kxk.conv.weight"]
    with pytest.raises(MissingKeys) as caught:
        recognise(state)
    assert caught.value.extra["keys"] == ["stages.1.1.conv_kxk.conv.weight"]
    assert "`stages.1.1.conv_kxk.conv.weight`" in caught.value.detail
    assert "rbr_" not in caught.value.detail


def test_half_converted_files_are_refused_in_their_words(state: dict[str, Tensor]) -> None:
    mixed = {key: t for key, t in state.items() if not key.startswith("stages.1.1.")}
    mixed["stages.1.1.reparam_conv.weight"] = torch.zeros(16, 16, 3, 3)
    mixed["stages.1.1.reparam_conv.bias"] = torch.zeros(16)
    with pytest.raises(MixedForm) as caught:
        recognise(mixed)
    assert "stages.1.1.reparam_conv.weight" in caught.value.detail


def test_keys_that_would_meet_keep_their_own_names() -> None:
    shapes = {"stem.conv_kxk.bias": (), "stage0.rbr_dense.bias": (), "head.fc.bias": ()}
    assert renamed(shapes, TIMM) == {
        "stem.conv_kxk.bias": "stem.conv_kxk.bias",
        "stage0.rbr_dense.bias": "stage0.rbr_dense.bias",
        "head.fc.bias": "linear.bias",
    }


def test_gradients_reach_every_branch_of_mobileone_and_fastvit() -> None:
    torch.manual_seed(0)
    small = MobileOne([8, 16], [1, 2], conv_branches=2, se_blocks=[0, 1], num_classes=3)
    vision = FastViT([1, 1], [32, 64], [64, 128], [False, True], [False, True], num_classes=3)
    for module in (small, vision):
        logits = module(torch.randn(6, 3, 64, 64))
        torch.nn.functional.cross_entropy(logits, torch.arange(6) % 3).backward()
        silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        # A ReLU inside squeeze-and-excitation may be shut for every image of so small a batch.
        assert all(".se." in name for name in silent), silent
