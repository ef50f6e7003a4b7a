"""GoogLeNet against a functional rewriting of the paper's table with torchvision's keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks import ModelConfig, build, deploy_names, deploy_skeleton, recognise
from service.networks.inception import GoogLeNet

CHANNELS = [(4, 3, 5, 2, 3, 4)] * 9


@pytest.fixture
def module() -> GoogLeNet:
    torch.manual_seed(0)
    module = GoogLeNet(CHANNELS, (6, 5, 7), transform_input=True, num_classes=5)
    for name, tensor in module.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith("running_mean"):
            nn.init.normal_(tensor)
    return module.double().eval()


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """GoogLeNet written out, batch norm by its formula."""

    def layer(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, var, gamma, beta = (
            state[f"{name}.bn.{part}"].reshape(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return torch.relu((x - mean) / torch.sqrt(var + 1e-3) * gamma + beta)

    def pool(x: Tensor, size: int) -> Tensor:
        return F.max_pool2d(x, size, 2, ceil_mode=True)

    means = torch.tensor([0.485, 0.456, 0.406], dtype=x.dtype).reshape(1, 3, 1, 1)
    stds = torch.tensor([0.229, 0.224, 0.225], dtype=x.dtype).reshape(1, 3, 1, 1)
    x = ((x * stds + means) - 0.5) / 0.5
    x = pool(layer("conv1", x, 2), 3)
    x = pool(layer("conv3", layer("conv2", x)), 3)
    for stage, places in (("3", "ab"), ("4", "abcde"), ("5", "ab")):
        for place in places:
            name = f"inception{stage}{place}"
            x = torch.cat(
                [
                    layer(f"{name}.branch1", x),
                    layer(f"{name}.branch2.1", layer(f"{name}.branch2.0", x)),
                    layer(f"{name}.branch3.1", layer(f"{name}.branch3.0", x)),
                    layer(f"{name}.branch4.1", F.max_pool2d(x, 3, 1, 1)),
                ],
                1,
            )
        if stage != "5":
            x = pool(x, 3 if stage == "3" else 2)
    return x.mean((2, 3)) @ state["fc.weight"].t() + state["fc.bias"]


def test_the_network_computes_the_papers_table(module: GoogLeNet) -> None:
    x = torch.randn(2, 3, 96, 80, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(module.state_dict(), x)
        torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
        module.transform_input = False
        assert not torch.allclose(module(x), expected)


def test_torchvisions_keys_are_recognised_and_auxiliary_heads_dropped() -> None:
    with torch.device("meta"):
        state = GoogLeNet().state_dict()
        state["aux1.conv.conv.weight"] = torch.zeros(128, 512, 1, 1)
        state["aux2.fc2.bias"] = torch.zeros(1000)
    found = recognise(state)
    assert found.name == "GoogLeNet (Inception-V1)"
    assert found.dropped == ("aux1.conv.conv.weight", "aux2.fc2.bias")
    assert found.hyperparameters["large_kernel"] == 3
    # 57 convolutions: three in the stem and six in each of nine modules.
    assert len(deploy_names(GoogLeNet(CHANNELS, (6, 5, 7)))) == 57
    assert state["inception4e.branch3.1.conv.weight"].shape == (128, 32, 3, 3)


def test_a_checkpoint_comes_back(module: GoogLeNet) -> None:
    state = module.float().state_dict()
    said = {"name": "GoogLeNet", "transform_input": True}
    recognition = recognise(state, ModelConfig(architecture=said, input_shape=(3, 64, 64)))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(build(recognition, state)(x), module(x), rtol=0, atol=0)
    assert "conv1.conv.bias" in deploy_skeleton(module).state_dict()
