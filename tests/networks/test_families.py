"""What single families promise beyond their conformance cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.errors import InvalidConfig
from service.networks import (
    ModelConfig,
    Reparameterizable,
    ResNet,
    build,
    deploy_names,
    deploy_skeleton,
    recognise,
)
from service.networks.acnet import (
    CifarQuick,
    CifarResNet,
    CifarVGG,
    MobileNet,
    StageResNet,
    WideResNet,
)
from service.networks.ecbsr import ECB, ECBSR
from service.networks.family import Family
from service.networks.keys import Keys
from service.networks.mobilenet import MobileNetV1
from service.networks.qarepvgg import QARepVGG, QARepVGGBlock, YoloQARepVGGBlock
from service.networks.repghost import REPGHOST, RepGhostNet
from service.networks.replknet import RepLKNet
from service.networks.repvit import REPVIT, Classifier, RepViT
from service.networks.table import FAMILIES
from service.networks.unireplknet import UNIREPLKNET, DilatedReparamBlock, UniRepLKNet

SMALL: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("ACNet-CFQKBN", CifarQuick(), (3, 32, 32)),
    ("ACNet-VGG (custom)", CifarVGG([8] * 13, 8), (3, 32, 32)),
    ("ACNet-SRC (custom)", CifarResNet([1, 1, 1], [4, 8, 8]), (3, 32, 32)),
    ("ACNet-WRN (custom)", WideResNet([1, 1], [8, 16], 4), (3, 32, 32)),
    ("ACNet-SResNet (custom)", StageResNet([2, 1], [4, 8], [16, 24], 4), (3, 32, 32)),
    ("ACNet-MobileNet (custom)", MobileNet(8, [8, 16], num_classes=5), (3, 32, 32)),
    (
        "OREPA-RepVGG-ResNet (custom)",
        ResNet("orepa_vgg", "basic", [1, 1], [8, 16], stem_width=8, num_classes=5),
        (3, 32, 32),
    ),
    (
        "OREPA-RepVGG-MobileNet (custom)",
        MobileNetV1("orepa_vgg", 8, [8, 16], num_classes=5),
        (3, 32, 32),
    ),
    ("QARepVGG (custom)", QARepVGG([1, 2], [8, 16], num_classes=5), (3, 32, 32)),
    ("QARepVGG (custom)", QARepVGG([1], [8], normed=True, num_classes=5), (3, 32, 32)),
    ("ECBSR", ECBSR(1, 8, 2), (1, 12, 10)),
    ("ECBSR", ECBSR(1, 8, 2, in_channels=3), (3, 12, 10)),
    ("RepLKNet (custom)", RepLKNet([1, 1], [8, 16], [7, 5], 3, num_classes=4), (3, 32, 32)),
    (
        "UniRepLKNet (custom)",
        UniRepLKNet([1, 2], [8, 16], [[3], [7, 3]], num_classes=4),
        (3, 32, 32),
    ),
    (
        "RepGhostNet (custom)",
        RepGhostNet([[[8, 8, 3, 1, 0], [12, 16, 5, 2, 4]]], 8, 24, 16, num_classes=4),
        (3, 32, 32),
    ),
    (
        "RepViT (custom)",
        RepViT([[16, 1, 4], [24, 2, 0], [24, 1, 0]], True, num_classes=4),
        (3, 32, 32),
    ),
]
IDS = [name for name, _, _ in SMALL]


def randomised(module: nn.Module) -> nn.Module:
    """The module with every parameter and statistic away from its fresh value."""
    torch.manual_seed(0)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif tensor.is_floating_point() and (tensor.ndim <= 1 or name.endswith(".vector")):
            nn.init.uniform_(tensor, -0.5, 1.0)
    return module


@pytest.mark.parametrize(("name", "module", "shape"), SMALL, ids=IDS)
def test_a_checkpoint_comes_back_as_the_same_function(
    name: str, module: nn.Module, shape: tuple[int, ...]
) -> None:
    state = randomised(module).eval().state_dict()
    recognition = recognise(state, ModelConfig(input_shape=shape))
    assert (recognition.name, recognition.form) == (name, "train")
    x = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(build(recognition, state)(x), module(x), rtol=0, atol=0)


def test_the_enlarged_image_begins_with_every_pixel_in_its_place() -> None:
    module = ECBSR(1, 4, 2, in_channels=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        x = torch.randn(1, 3, 4, 5)
        expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(module.eval()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "module", "shape"), SMALL, ids=IDS)
def test_the_deploy_form_comes_back_and_computes(
    name: str, module: nn.Module, shape: tuple[int, ...]
) -> None:
    skeleton = deploy_skeleton(module).eval()
    state = skeleton.state_dict()
    owned = set(state)
    for deploy in deploy_names(module).values():
        assert f"{deploy}.weight" in owned
    assert not any(isinstance(m, Reparameterizable) for m in skeleton.modules())
    recognition = recognise(state, ModelConfig(input_shape=shape))
    assert recognition.form == "deploy"
    x = torch.randn(2, *shape)
    with torch.no_grad():
        torch.testing.assert_close(build(recognition, state)(x), skeleton(x), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "module", "shape"), SMALL, ids=IDS)
def test_gradients_reach_every_parameter(
    name: str, module: nn.Module, shape: tuple[int, ...]
) -> None:
    randomised(module).train()
    out: Tensor = module(torch.randn(4, *shape))
    out.square().sum().backward()
    silent = [
        key
        for key, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    # A ReLU inside squeeze-and-excitation may be shut for every image of so small a batch.
    assert all(".se." in key or ".fc" in key for key in silent), silent


def _published() -> list[tuple[Family, str]]:
    tables = (REPGHOST, REPVIT, UNIREPLKNET)
    names = {name for table in tables for name in table}
    return [(row, name) for row in FAMILIES for name in row.named if name in names]


@pytest.mark.parametrize(("row", "name"), _published(), ids=lambda value: str(value)[:30])
def test_published_networks_are_recognised(row: Family, name: str) -> None:
    with torch.device("meta"):
        state = row.make(**row.named[name]).state_dict()
    # A residual without parameters leaves no trace in the keys.
    if name != "RepGhostNet-wo-0.5x":
        assert recognise(state).name == name
    assert recognise(state, ModelConfig(architecture=name)).name == name


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.named], ids=lambda r: r.network)
def test_no_other_row_claims_a_published_network(row: Family) -> None:
    with torch.device("meta"):
        network = row.make(**next(iter(row.named.values())))
        folded = deploy_skeleton(network)

    def claimed(module: nn.Module) -> str:
        keys = Keys({key: tuple(tensor.shape) for key, tensor in module.state_dict().items()})
        return next(row.network for row in FAMILIES if row.claims(keys))

    assert claimed(network) == row.network
    # What these fold into is RepVGG itself, so RepVGG's row reads it.
    same_as_repvgg = row.network in ("OREPA-RepVGG", "QARepVGG")
    assert claimed(folded) == ("RepVGG" if same_as_repvgg else row.network)


def test_branches_without_keys_come_from_the_config() -> None:
    block = randomised(QARepVGGBlock(6, 6, avg_branch=True)).eval()
    state, x = block.state_dict(), torch.randn(1, 6, 8, 8)
    plain = build(recognise(state, ModelConfig(input_shape=(6, 8, 8))), state)
    assert not torch.allclose(plain(x), block(x))
    said: dict[str, Any] = {"name": "QARepVGGBlock", "avg_branch": True}
    found = recognise(state, ModelConfig(architecture=said, input_shape=(6, 8, 8)))
    torch.testing.assert_close(build(found, state)(x), block(x), rtol=0, atol=0)


def test_yolov6_keeps_the_last_norm_and_the_paper_folds_it() -> None:
    assert "bn.weight" in deploy_skeleton(YoloQARepVGGBlock(4, 4)).state_dict()
    assert "bn.weight" not in deploy_skeleton(QARepVGGBlock(4, 4)).state_dict()


def test_the_border_of_an_edge_block_is_its_bias() -> None:
    block = ECB(2, 2).conv1x1_3x3
    x = torch.randn(1, 2, 5, 4)
    bordered = block.bordered(x)
    inside = nn.functional.conv2d(x, block.k0, block.b0)
    torch.testing.assert_close(bordered[:, :, 1:-1, 1:-1], inside)
    corner = bordered[0, :, 0, 0]
    torch.testing.assert_close(corner, block.b0)


def test_dilations_come_from_the_keys() -> None:
    block = DilatedReparamBlock(4, 9, [[3, 4], [5, 1]])
    found = recognise(block.state_dict())
    assert found.hyperparameters["dilated"] == [[3, 4], [5, 1]]
    assert found.input_shape == (4, 32, 32)


def test_two_heads_become_one() -> None:
    head = Classifier(6, 3, distilled=True)
    assert set(deploy_skeleton(head).state_dict()) == {"weight", "bias"}


def test_an_input_of_the_wrong_rank_is_refused() -> None:
    state = Classifier(6, 3, distilled=False).classifier.state_dict()
    assert recognise(state, ModelConfig(input_shape=(6,))).input_shape == (6,)
    with pytest.raises(InvalidConfig) as caught:
        recognise(state, ModelConfig(input_shape=(6, 8, 8)))
    assert caught.value.extra["field"] == "input_shape"
