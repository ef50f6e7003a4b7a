"""The report's drawing of a block: its operators, and who reads whom."""

from __future__ import annotations

import torch
from torch import nn

from service.fusion import fuse
from service.fusion.report import Block
from service.graph import trace
from service.networks.repvgg import RepVGGBlock


def blocks_of(module: nn.Module, channels: int) -> tuple[Block, ...]:
    return fuse(trace(module.eval(), (torch.randn(2, channels, 8, 8),))).report.blocks


def test_a_fused_block_tells_its_branches() -> None:
    (block,) = blocks_of(RepVGGBlock(4, 4, groups=2), 4)
    short = [(o.op.removeprefix("aten."), o.module, o.kernel, o.groups) for o in block.operations]
    assert short == [
        ("conv2d", "rbr_dense.conv", (3, 3), 2),
        ("batch_norm", "rbr_dense.bn", (), 1),
        ("conv2d", "rbr_1x1.conv", (1, 1), 2),
        ("batch_norm", "rbr_1x1.bn", (), 1),
        ("add.Tensor", "", (), 1),
        ("batch_norm", "rbr_identity", (), 1),
        ("add.Tensor", "", (), 1),
    ]
    reads = [operation.reads for operation in block.operations]
    assert reads == [(-1,), (0,), (-1,), (2,), (1, 3), (-1,), (4, 5)]
    assert len(block.operations) == block.operators_before


def test_operators_are_read_in_order_and_end_in_one() -> None:
    made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for block in blocks_of(made, 3):
        read = {position for o in block.operations for position in o.reads}
        assert all(max(o.reads) < at for at, o in enumerate(block.operations))
        assert read == set(range(-1, len(block.operations) - 1))


def test_a_kept_convolution_is_its_only_operator() -> None:
    (block,) = blocks_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 3)
    (operation,) = block.operations
    assert (block.status, operation.kernel, operation.reads) == ("kept", (3, 3), (-1,))
