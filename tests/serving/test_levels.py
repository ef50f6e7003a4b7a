"""Images on their way through the batcher: as grey levels where the device takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from service.serving import Batcher, BatchPart, Device, Levels, RowSpec
from service.serving.backends.base import Streams
from service.serving.backends.parts import joined, normalised
from tests.serving.fakes import Doubler

LEVELS = Levels((0.5, 0.25, 2.0), (1.0, 0.0, -3.0))


class Sums(Doubler):
    """Answers the sum of every image; notes which parts came as grey levels."""

    def __init__(self, takes_parts: bool) -> None:
        super().__init__()
        self.inputs = (RowSpec("input_0", (3, 2, 2), torch.float32),)
        self.outputs = (RowSpec("output_0", (), torch.float32),)
        self.streams = Streams(2, 8, self.run, self._run_parts if takes_parts else None)
        self.came: list[list[bool]] = []

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].sum((1, 2, 3)),)

    def _run_parts(self, parts: Sequence[BatchPart]) -> tuple[Tensor, ...]:
        self.came.append([part.levels is not None for part in parts])
        return self.run(joined(parts))


def grey(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 2, 2, 3), generator=random, dtype=torch.uint8)


@pytest.mark.parametrize("takes_parts", [True, False])
def test_everybody_gets_the_answer_to_their_own_whatever_they_sent(takes_parts: bool) -> None:
    fake, device = Sums(takes_parts), Device("cpu", threads=2)
    requests: list[BatchPart | Tensor] = [
        BatchPart((grey(2, 0),), LEVELS),
        torch.randn(1, 3, 2, 2),
        BatchPart((grey(7, 1),), LEVELS),  # more than a stream takes at once: it is cut
    ]

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        assert batcher.takes_levels is takes_parts
        results = await asyncio.gather(*map(batcher.submit, requests))
        for request, result in zip(requests, results, strict=True):
            rows = (
                request if isinstance(request, Tensor) else normalised(request.columns[0], LEVELS)
            )
            assert np.allclose(result.outputs[0], rows.sum((1, 2, 3)).numpy(), atol=1e-3)
        await batcher.close()

    asyncio.run(scenario())
    device.close()
    kinds = {kind for batch in fake.came for kind in batch}
    assert kinds == ({True, False} if takes_parts else set())
