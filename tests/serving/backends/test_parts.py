"""Rows as they come from their callers, joined and normalised on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from service.api import images
from service.errors import BadInput
from service.serving.backends.parts import BatchPart, Levels, joined, normalised
from service.serving.backends.rows import RowSpec
from service.serving.columns import checked

LEVELS = Levels((0.5, 0.25, 2.0), (1.0, 0.0, -3.0))
INPUT = (RowSpec("x", (3, 4, 5), torch.float32),)


def grey(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 4, 5, 3), generator=random, dtype=torch.uint8)


def truth(values: Tensor) -> Tensor:
    scale, shift = torch.tensor(LEVELS.scale), torch.tensor(LEVELS.shift)
    return (values.float() * scale - shift).permute(0, 3, 1, 2)


def test_grey_levels_are_normalised_channel_by_channel() -> None:
    values = grey(3)
    assert torch.equal(normalised(values, LEVELS), truth(values))
    assert not torch.equal(normalised(values.flip(3), LEVELS), truth(values))


def test_parts_are_joined_in_their_order_whatever_they_came_as() -> None:
    first, rows, last = grey(2, 1), torch.randn(1, 3, 4, 5), grey(1, 2)
    parts = [
        BatchPart((first,), LEVELS),
        BatchPart((rows,)),
        BatchPart((last,), LEVELS),
    ]
    (whole,) = joined(parts)
    assert torch.equal(whole, torch.cat([truth(first), rows, truth(last)]))


def test_one_part_is_not_copied() -> None:
    rows = torch.randn(2, 3)
    assert joined([BatchPart((rows,))])[0] is rows


@pytest.mark.parametrize("channels", [1, 3])
def test_a_device_normalises_as_the_host_does(channels: int) -> None:
    how = images.recipe((channels, 4, 5), {"mean": [0.485], "std": [0.229]})
    assert how is not None
    pixels = grey(2)[..., :channels].numpy()
    host = images.normalised(pixels, how)
    device = normalised(torch.from_numpy(pixels.copy()), images.levels(how))
    assert np.array_equal(host, device.numpy())  # to the last bit


def test_a_program_that_takes_no_levels_gets_rows() -> None:
    part = BatchPart((grey(2),), LEVELS)
    assert checked(part, INPUT, levels=True) is part
    plain = checked(part, INPUT)
    assert plain.levels is None
    assert torch.equal(plain.columns[0], truth(part.columns[0]))


@pytest.mark.parametrize(
    "values",
    [
        grey(1).float(),
        grey(1).permute(0, 3, 1, 2),
        grey(1)[0],
        grey(0),
        grey(1)[..., :1],
    ],
)
def test_levels_of_another_shape_or_type_are_refused(values: Tensor) -> None:
    with pytest.raises(BadInput):
        checked(BatchPart((values,), LEVELS), INPUT, levels=True)


def test_levels_for_several_inputs_are_refused() -> None:
    with pytest.raises(BadInput):
        checked(BatchPart((grey(1),), LEVELS), INPUT * 2, levels=True)
