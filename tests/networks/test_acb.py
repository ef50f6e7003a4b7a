"""The asymmetric convolution block beyond the conformance cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.networks import ModelConfig, recognise
from service.networks.acb import ACBlock


@settings(max_examples=25, deadline=None)
@given(size=st.sampled_from([3, 5, 7]), pad=st.integers(0, 6), stride=st.integers(1, 2))
def test_the_three_windows_share_their_centre(size: int, pad: int, stride: int) -> None:
    torch.manual_seed(0)
    block = ACBlock(2, 3, size, stride, pad).double().eval()
    x = torch.randn(1, 2, 15, 13, dtype=torch.float64)
    square = block.square_conv.weight.detach().clone()
    middle = size // 2
    square[:, :, :, middle : middle + 1] += block.ver_conv.weight.detach()
    square[:, :, middle : middle + 1, :] += block.hor_conv.weight.detach()
    # Fresh norms only divide by sqrt(1 + eps).
    whole = torch.nn.functional.conv2d(x, square, stride=stride, padding=pad)
    torch.testing.assert_close(block(x), whole / (1 + 1e-5) ** 0.5, rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_branch() -> None:
    block = ACBlock(4, 4, 3, groups=2)
    block(torch.randn(2, 4, 7, 7)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_groups_come_from_the_input_shape(groups: int) -> None:
    state = ACBlock(8, 8, 3, groups=groups, affine=False).state_dict()
    found = recognise(state, ModelConfig(input_shape=(8, 16, 16)))
    assert found.hyperparameters["groups"] == groups
    assert found.hyperparameters["affine"] is False
