"""The Diverse Branch Block and its networks against the official code's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from service.networks import (
    DiverseBranchBlock,
    MobileNetV1,
    ModelConfig,
    ResNet,
    build,
    deploy_names,
    deploy_skeleton,
    recognise,
)
from service.networks.blocks import BNAndPad
from tests.networks import cases

BLOCKS = cases.names("blk_dbb")
NAMES = {"dbb_resnet18": "DBB-ResNet-18", "dbb_mobilenet": "DBB-MobileNet"}


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names("dbb_"))
def test_networks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name)
    assert recognition.family == "dbb"
    assert recognition.name == NAMES.get(name, recognition.name)
    assert cases.error_f64(name, module) < 1e-10
    skeleton = {key: tuple(t.shape) for key, t in deploy_skeleton(module).state_dict().items()}
    assert list(skeleton.items()) == list(cases.deploy_shapes(name).items())


@cases.needs_cases
@pytest.mark.parametrize("name", BLOCKS)
def test_bare_blocks_equal_the_official_training_form(name: str) -> None:
    recognition, module = cases.built(name, "DiverseBranchBlock")
    assert recognition.name == "DiverseBranchBlock"
    assert cases.error_f64(name, module) < 1e-10
    assert deploy_names(module) == {"": "dbb_reparam"}
    skeleton = {key: tuple(t.shape) for key, t in deploy_skeleton(module).state_dict().items()}
    assert skeleton == cases.deploy_shapes(name)


@cases.needs_cases
@pytest.mark.parametrize("name", BLOCKS)
def test_groups_and_channels_of_a_block_come_from_its_keys(name: str) -> None:
    attrs = cases.load(name)["attrs"]
    found = recognise(cases.state_of(name)).hyperparameters
    assert found["groups"] == attrs["groups"]
    assert found["kernel_size"] == attrs["kernel_size"]
    assert found["in_channels"] == cases.load(name)["input"]["shape"][1]


@cases.needs_cases
@pytest.mark.parametrize("name", BLOCKS)
def test_wrong_eps_zero_border_and_dropped_branch_are_seen(name: str) -> None:
    _, wrong = cases.built(name, "DiverseBranchBlock", eps=1e-3)
    assert cases.error_f64(name, wrong) > 1e-6
    _, dropped = cases.built(name, "DiverseBranchBlock")
    assert isinstance(dropped, DiverseBranchBlock)
    nn.init.zeros_(dropped.dbb_avg.avgbn.weight)
    assert cases.error_f64(name, dropped) > 1e-3
    _, bare = cases.built(name, "DiverseBranchBlock")
    for layer in bare.modules():
        if isinstance(layer, BNAndPad):
            layer.border = lambda: torch.zeros(())  # type: ignore[method-assign]
    assert cases.error_f64(name, bare) > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_bn_and_pad_fills_the_border_as_the_paper_says(training: bool) -> None:
    torch.manual_seed(0)
    layer = BNAndPad(3, 2).double().train(training)
    for tensor in (layer.bn.weight, layer.bn.bias, layer.bn.running_mean):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    got = layer(x)
    bn = layer.bn  # in training mode its statistics have just moved, and the border follows them
    assert bn.running_mean is not None
    assert bn.running_var is not None
    value = bn.bias - bn.running_mean * bn.weight / (bn.running_var + bn.eps).sqrt()
    expected = value.reshape(1, 3, 1, 1).repeat(4, 1, 9, 10)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = bn.running_mean, bn.running_var

    def per_channel(t: Tensor) -> Tensor:
        return t.reshape(1, 3, 1, 1)

    inner = (x - per_channel(mean)) / per_channel(var + bn.eps).sqrt()
    expected[:, :, 2:-2, 2:-2] = inner * per_channel(bn.weight) + per_channel(bn.bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    border = got[:, :, 0].sum()
    gradient = torch.autograd.grad(border, [bn.bias], allow_unused=True)[0]
    assert gradient is not None
    assert bool(gradient.any()) is not training


@pytest.mark.parametrize(
    "values",
    [
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3},
        {"in_channels": 4, "out_channels": 8, "kernel_size": 5, "groups": 2, "stride": 2},
        {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6},
        {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "internal_channels": 10},
    ],
)
def test_gradients_reach_every_branch(values: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = DiverseBranchBlock(**values)
    block(torch.randn(3, values["in_channels"], 9, 9)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


@settings(max_examples=30, deadline=None)
@given(
    block=st.sampled_from(["basic", "bottleneck"]),
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    planes=st.lists(st.sampled_from([4, 6, 8, 12]), min_size=4, max_size=4),
    kernel=st.sampled_from([3, 5, 7]),
    channels=st.integers(1, 4),
    classes=st.integers(2, 9),
)
def test_recognition_gives_back_the_values_of_a_resnet(
    block: str, depths: list[int], planes: list[int], kernel: int, channels: int, classes: int
) -> None:
    values = {
        "block": block,
        "num_blocks": depths,
        "planes": planes[: len(depths)],
        "stem_width": 8,
        "stem_kernel": kernel,
        "in_channels": channels,
        "num_classes": classes,
    }
    with torch.device("meta"):
        module = ResNet("dbb", **values)
        skeleton = deploy_skeleton(module)
    for form, state in (("train", module.state_dict()), ("deploy", skeleton.state_dict())):
        found = recognise(state)
        assert found.form == form
        assert found.family == "dbb"
        assert {k: found.hyperparameters[k] for k in values} == values


def test_a_custom_mobilenet_is_recognised() -> None:
    with torch.device("meta"):
        module = MobileNetV1("dbb", stem_width=8, widths=[16, 16, 24], num_classes=5)
    found = recognise(module.state_dict())
    assert found.name == "DBB-MobileNet (custom)"
    assert found.hyperparameters["widths"] == [16, 16, 24]
    assert found.num_classes == 5


def test_a_small_network_for_small_images_trains_and_comes_back_from_its_checkpoint() -> None:
    torch.manual_seed(0)
    values = {"num_blocks": [1, 1], "planes": [8, 12], "stem_width": 8, "stem_kernel": 3}
    small = {"stem_stride": 1, "stem_pool": False}
    module = ResNet("dbb", "basic", in_channels=1, num_classes=10, **values, **small)
    x, target = torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(module(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = module.state_dict()
    found = recognise(state, ModelConfig(input_shape=(1, 8, 8)))
    assert found.name == "DBB-ResNet (custom)"
    again = build(found, state)
    torch.testing.assert_close(again(x), module.eval()(x), rtol=0, atol=0)
