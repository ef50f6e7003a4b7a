"""OREPA beyond the conformance cases: one convolution while training, and every branch learns."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.orepa import saved_bytes
from service.demo.digits import Digits, Recipe, accuracy, load_digits, train
from service.fusion import fuse
from service.graph import run
from service.networks import ModelConfig, ResNet, build, recognise
from service.networks.orepa import (
    OREPA,
    OREPA1x1,
    OREPALarge,
    OREPARepVGGBlock,
    frequency_prior,
)
from service.networks.unit_vgg import UnitVGG

BLOCKS: list[nn.Module] = [
    OREPA(4, 6),
    OREPA(8, 8, groups=2),
    OREPA(16, 16, groups=8),
    OREPA1x1(4, 7),
    OREPA1x1(7, 4),
    OREPALarge(3, 4, 7),
    OREPALarge(3, 4, 9, squeezed=False),
    OREPARepVGGBlock(6, 6),
]


def test_a_composition_that_cannot_run_is_not_made() -> None:
    with pytest.raises(ValueError, match="groups"):
        OREPALarge(4, 4, 7, groups=2)
    plain = OREPALarge(4, 4, 7, groups=2, squeezed=False)  # the control
    assert plain(torch.randn(2, 4, 8, 8)).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_gradients_reach_every_branch(block: nn.Module) -> None:
    torch.manual_seed(0)
    block.train()
    for name, parameter in block.named_parameters():
        if name.endswith("vector"):  # fresh rows of zero would hide their branch
            nn.init.uniform_(parameter, 0.5, 1.5)
    channels = block.geometry.in_channels
    assert isinstance(channels, int)
    block(torch.randn(3, channels, 12, 12)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_features_meet_one_convolution_while_training() -> None:
    block = OREPA(4, 6).train()
    x = torch.randn(2, 4, 8, 8)
    block(x)
    calls = 0
    original = torch.nn.functional.conv2d

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", counted)
        block(x)
    assert calls == 1


def test_the_initial_scales_are_those_of_the_paper() -> None:
    rows = OREPA(4, 6).get_parameter("vector")[:, 0].tolist()
    assert rows == [0.25, 0.25, 0.0, 0.5, 1.0, 0.5]
    plain = OREPARepVGGBlock(4, 6).rbr_dense.get_parameter("vector")
    assert plain[:, 0].tolist() == [0.25, 0.25, 0.0, 0.5, 0.5]
    assert OREPARepVGGBlock(6, 6).rbr_dense.get_parameter("vector").shape == (6, 6)


def test_the_frequency_prior_switches_direction_at_half_the_channels() -> None:
    prior = frequency_prior(7, 3).double()
    for channel in range(7):
        along_height = channel < 3.5
        same = prior[channel, :, :1] if along_height else prior[channel, :1]
        assert prior[channel].equal(same.expand(3, 3))

    assert prior[0, 1, 0] == pytest.approx(math.cos(math.pi * 1.5 / 3), abs=1e-6)
    assert prior[6, 0, 2] == pytest.approx(math.cos(math.pi * 2.5 * 3.5 / 3), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(inner=st.integers(1, 4), outer=st.integers(1, 4), groups=st.sampled_from([1, 2, 3, 5, 8]))
def test_groups_of_a_block_come_from_its_keys(inner: int, outer: int, groups: int) -> None:
    state = OREPA(inner * groups, outer * groups, groups=groups).state_dict()
    found = recognise(state).hyperparameters
    assert (found["in_channels"], found["out_channels"]) == (inner * groups, outer * groups)
    assert found["groups"] == groups


def test_networks_are_recognised() -> None:
    with torch.device("meta"):
        residual = ResNet(
            "orepa",
            "bottleneck",
            [3, 4, 6, 3],
            planes=[128, 256, 512, 1024],
            groups=32,
            expansion=2,
        )
        plain = UnitVGG("orepa", [1, 2], [16, 24], num_classes=7)
    assert recognise(residual.state_dict()).name == "OREPA-ResNeXt-50"
    found = recognise(plain.state_dict())
    assert found.name == "OREPA-VGG (custom)"
    assert found.hyperparameters["widths"] == [16, 24]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Digits]:
    data = load_digits()
    recipe = Recipe("digits-orepa", "OREPA", partial(_residual, "orepa"), {}, epochs=8)
    return train(recipe, data), data


def _residual(unit: str) -> ResNet:
    """A ResNet of two basic blocks for 8x8 images."""
    shape = {"num_blocks": [1, 1], "planes": [12, 24], "stem_width": 12, "stem_kernel": 3}
    stem = {"stem_stride": 1, "stem_pool": False, "in_channels": 1, "num_classes": 10}
    return ResNet(unit=unit, block="basic", **shape, **stem)


def test_it_learns_digits_and_keeps_what_it_learnt_when_folded(
    trained: tuple[nn.Module, Digits],
) -> None:
    network, data = trained
    assert accuracy(network, data) > 0.9
    assert accuracy(_residual("orepa").eval(), data) < 0.5

    config = ModelConfig(input_shape=(1, 8, 8))
    state = network.state_dict()
    again = build(recognise(state, config), state)
    fusion = fuse(again, (data.test_images[:2],))
    assert fusion.report.totals.fused == 6
    (scores,) = run(fusion.program, data.test_images)
    with torch.no_grad():
        wanted = network(data.test_images)
    assert scores.argmax(1).equal(wanted.argmax(1))
    assert float((scores - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_training_moves_every_branch_and_every_scale(trained: tuple[nn.Module, Digits]) -> None:
    network, _ = trained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = _residual("orepa")
    before = dict(fresh.named_parameters())
    for name, parameter in network.named_parameters():
        assert not parameter.detach().allclose(before[name], rtol=1e-3, atol=1e-5), name
    rows = [p for name, p in network.named_parameters() if name.endswith("vector")]
    assert len(rows) == 5
    assert all(bool((row.std(1) > 0).all()) for row in rows)


def test_training_keeps_less_for_the_backward_pass_than_dbb() -> None:
    batch = torch.randn(64, 1, 8, 8)
    saved = {kind: saved_bytes(_residual(kind).train(), batch) for kind in ("orepa", "dbb", "base")}
    assert saved["orepa"] < saved["dbb"] / 2
    # What is left beside a plain network is the kernels of the branches, whatever the batch.
    double = saved_bytes(_residual("orepa").train(), torch.cat([batch, batch]))
    plain = saved_bytes(_residual("base").train(), torch.cat([batch, batch]))
    assert double - saved["orepa"] == plain - saved["base"]
