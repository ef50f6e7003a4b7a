"""A program with two inputs and three outputs of different shapes and types, and its truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from service.graph import Program, trace
from service.serving import Prepared


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scaled = x * y[:, None, None, None]
        return scaled, y + 1, y > 2


def program() -> Program:
    """The traced module."""
    return trace(Pair().eval(), (torch.zeros(1, 2, 4, 4), torch.zeros(1, dtype=torch.int64)))


def rows(*labels: int) -> tuple[Tensor, Tensor]:
    """One row for each label, so that an answer says whose it is."""
    y = torch.tensor(labels, dtype=torch.int64)
    return torch.arange(1.0, 33.0).reshape(2, 4, 4).repeat(len(labels), 1, 1, 1), y


def is_answer(outputs: Sequence[object], *labels: int) -> bool:
    """Whether the outputs are those of `rows(*labels)`, types included."""
    truth = Pair()(*rows(*labels))
    got = [torch.as_tensor(output) for output in outputs]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, truth, strict=True))


def check(prepared: Prepared) -> None:
    """`prepared` says what it takes and gives, and answers so for every number of rows."""
    assert [(s.name, s.shape, s.dtype) for s in prepared.inputs] == [
        ("input_0", (2, 4, 4), torch.float32),
        ("input_1", (), torch.int64),
    ]
    assert [(s.name, s.shape, s.dtype) for s in prepared.outputs] == [
        ("output_0", (2, 4, 4), torch.float32),
        ("output_1", (), torch.int64),
        ("output_2", (), torch.bool),
    ]
    for labels in ((1,), (2, 3), (3, 1, 2), (4, 3, 2, 1)):
        outputs = prepared.run(rows(*labels))
        assert is_answer(outputs, *labels)
        assert not is_answer(outputs, *(label + 1 for label in labels))
