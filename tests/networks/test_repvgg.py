"""RepVGG and RepVGGplus against the official code's outputs, and recognition against truth."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.networks import (
    ModelConfig,
    RepVGG,
    RepVGGBlock,
    RepVGGplus,
    deploy_names,
    deploy_skeleton,
    recognise,
)
from service.networks.repvgg import REPVGG
from service.networks.vgg import alternate_groups
from tests.networks import cases

NAMES = {
    "repvgg_a0": "RepVGG-A0",
    "repvgg_a0_r224": "RepVGG-A0",
    "repvgg_a1": "RepVGG-A1",
    "repvgg_b1g2": "RepVGG-B1g2",
    "repvgg_custom_se": "RepVGG (custom)",
    "repvgg_tiny": "RepVGG (custom)",
    "repvggplus_custom": "RepVGGplus (custom)",
}
BLOCKS = cases.names("blk_repvgg", "blk_yolov6_repvgg")


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names("repvgg"))
def test_networks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name)
    if name in NAMES:
        assert recognition.name == NAMES[name]
    assert recognition.family == "repvgg"
    assert recognition.form == "train"
    assert cases.error_f64(name, module) < 1e-10
    skeleton = {key: tuple(t.shape) for key, t in deploy_skeleton(module).state_dict().items()}
    assert list(skeleton.items()) == list(cases.deploy_shapes(name).items())


@cases.needs_cases
@pytest.mark.parametrize("name", BLOCKS)
def test_bare_blocks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name, "RepVGGBlock")
    assert recognition.name == "RepVGGBlock"
    assert cases.error_f64(name, module) < 1e-10
    assert deploy_names(module) == {"": "rbr_reparam"}
    skeleton = {key: tuple(t.shape) for key, t in deploy_skeleton(module).state_dict().items()}
    assert skeleton == cases.deploy_shapes(name)


@cases.needs_cases
@pytest.mark.parametrize("name", BLOCKS)
def test_a_wrong_eps_or_a_dropped_branch_is_seen(name: str) -> None:
    eps = cases.load(name)["attrs"]["eps"]
    _, wrong = cases.built(name, "RepVGGBlock", eps=1e-5 if eps == 1e-3 else 1e-3)
    assert cases.error_f64(name, wrong) > 1e-6
    _, dropped = cases.built(name, "RepVGGBlock")
    assert isinstance(dropped, RepVGGBlock)
    torch.nn.init.zeros_(dropped.rbr_1x1.conv.weight)
    assert cases.error_f64(name, dropped) > 1e-3


@cases.needs_cases
def test_se_stands_before_the_activation_in_repvgg_and_after_it_in_plus() -> None:
    for name in ("repvgg_custom_se", "repvggplus_custom"):
        _, module = cases.built(name)
        for block in module.modules():
            if isinstance(block, RepVGGBlock):
                block.se, block.post_se = block.post_se, block.se
        assert cases.error_f64(name, module) > 1e-3


@cases.needs_cases
def test_auxiliary_heads_are_dropped_and_said_so() -> None:
    recognition, _ = cases.built("repvggplus_custom")
    assert "stage1_aux.0.conv.weight" in recognition.dropped
    assert all("_aux." in key for key in recognition.dropped)
    assert any("uxiliary" in sentence for sentence in recognition.assumed)


@pytest.mark.parametrize("name", REPVGG)
def test_every_published_network_is_recognised_by_its_keys(name: str) -> None:
    with torch.device("meta"):
        module = RepVGG(**REPVGG[name])
        skeleton = deploy_skeleton(module)
    train = recognise(module.state_dict())
    assert (train.name, train.form, train.num_classes) == (name, "train", 1000)
    deploy = recognise(skeleton.state_dict())
    assert (deploy.name, deploy.form) == (name, "deploy")


def test_published_widths_and_groups() -> None:
    # RepVGG paper, table 2 (A0: 48, 48, 96, 192, 1280) and section 4.1 (every second layer).
    assert REPVGG["RepVGG-A0"]["widths"] == [48, 96, 192, 1280]
    assert REPVGG["RepVGG-B1g4"]["widths"] == [128, 256, 512, 2048]
    assert alternate_groups(4, 6) == [1, 1, 4, 1, 4, 1]
    with torch.device("meta"):
        plain, grouped = RepVGG(**REPVGG["RepVGG-B1"]), RepVGG(**REPVGG["RepVGG-B1g4"])
    # Layer 26 is the last grouped one, in stage 3 or 4: stage 4's only block is layer 27.
    assert isinstance(plain.stage0, RepVGGBlock)
    assert plain.get_submodule("stage3.15").geometry.groups == 1
    assert grouped.get_submodule("stage3.15").geometry.groups == 4
    assert grouped.get_submodule("stage4.0").geometry.groups == 1


@st.composite
def _networks(draw: st.DrawFn) -> dict[str, Any]:
    depths = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    layers = 1 + sum(depths)
    uniform = st.sampled_from([1, 2, 4])
    listed = st.lists(st.sampled_from([1, 2, 4]), min_size=layers - 1, max_size=layers - 1)
    return {
        "num_blocks": depths,
        "widths": [8 * draw(st.integers(1, 4)) for _ in depths],
        "stem_width": draw(st.sampled_from([8, 16])),
        "groups": draw(uniform | listed.map(lambda rest: [1, *rest])),
        "se_ratio": draw(st.sampled_from([0, 2, 8])),
        "in_channels": draw(st.integers(1, 4)),
        "num_classes": draw(st.integers(2, 12)),
    }


@settings(max_examples=40, deadline=None)
@given(values=_networks())
def test_recognition_gives_back_the_constructor_values(values: dict[str, Any]) -> None:
    with torch.device("meta"):
        module = RepVGG(**values)
    found = recognise(module.state_dict()).hyperparameters
    layers = 1 + sum(values["num_blocks"])

    def per_layer(groups: int | list[int]) -> list[int]:
        return alternate_groups(groups, layers) if isinstance(groups, int) else groups

    for name in ("num_blocks", "widths", "se_ratio", "in_channels", "num_classes"):
        assert found[name] == values[name]
    assert per_layer(found["groups"]) == per_layer(values["groups"])
    assert (found["stem_width"] or min(64, values["widths"][0])) == values["stem_width"]
    json.dumps(found)


def test_small_images_need_their_strides_from_the_config() -> None:
    values = {"num_blocks": [1, 2], "widths": [16, 32], "stem_stride": 1, "strides": [1, 2]}
    module = RepVGG(in_channels=1, num_classes=10, **values).eval()
    architecture = {"name": "RepVGG", "stem_stride": 1, "strides": [1, 2]}
    config = ModelConfig(architecture=architecture, input_shape=(1, 8, 8))
    found = recognise(module.state_dict(), config)
    assert found.input_shape == (1, 8, 8)
    assert found.hyperparameters["strides"] == [1, 2]
    assert not any("stem_stride" in sentence for sentence in found.assumed)
    again = cases.outputs(RepVGG(**found.hyperparameters).eval(), torch.zeros(2, 1, 8, 8))
    assert again.shape == (2, 10)
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_gradients_reach_every_branch_and_a_step_lowers_the_loss() -> None:
    torch.manual_seed(0)
    module = RepVGG([1, 2], [8, 16], se_ratio=4, in_channels=1, num_classes=3)
    x, target = torch.randn(12, 1, 16, 16), torch.arange(12) % 3
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(module(x), target)
        optimiser.zero_grad()
        loss.backward()
        missing = [k for k, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert all(".se.down" in key or ".se.up" in key for key in missing), missing
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_plus_has_the_official_keys_and_no_auxiliary_heads() -> None:
    module = RepVGGplus([1, 1, 3, 1], [8, 8, 16, 16])
    assert "stage3_first.blocks.0.post_se.down.weight" in module.state_dict()
    assert "stage3_second.blocks.1.rbr_identity.weight" in module.state_dict()
    assert recognise(module.state_dict()).hyperparameters["num_blocks"] == [1, 1, 3, 1]
