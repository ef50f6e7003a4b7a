"""The rows of one batch as they come from their callers: not yet joined, not yet normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """How grey levels become a network's input: `level * scale[c] - shift[c]` in channel c.

    Both numbers are float32, and each of the two operations is rounded to it, so that the outcome
    is the same wherever it is computed.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class BatchPart:
    """Rows of one caller: a tensor [N, *shape] for each input of the program.

    With `levels` they are grey levels of the only input instead, [N, H, W, C] in uint8: a quarter
    of the bytes to move to a device that can normalise them itself.
    """

    columns: tuple[Tensor, ...]
    levels: Levels | None = None

    def __len__(self) -> int:
        return self.columns[0].size(0)  # torch answers `len` in Python, and every step asks it


def joined(parts: Sequence[BatchPart]) -> tuple[Tensor, ...]:
    """The rows of all parts behind each other, [N, *shape] for each input, normalised.

    By NumPy, because each of several threads that joined with torch would keep a pool of others.
    """
    columns = [
        part.columns if part.levels is None else (normalised(part.columns[0], part.levels),)
        for part in parts
    ]
    if len(columns) == 1:
        return columns[0]
    return tuple(
        torch.from_numpy(np.concatenate([c.numpy() for c in each]))
        for each in zip(*columns, strict=True)
    )


def normalised(values: Tensor, levels: Levels) -> Tensor:
    """Grey levels [N, H, W, C] in uint8 as the rows [N, C, H, W] in float32 that they stand for."""
    rows = values.permute(0, 3, 1, 2).float().contiguous()
    normalise(rows, levels)
    return rows


def normalise(rows: Tensor, levels: Levels) -> None:
    """Turn grey levels, [N, C, H, W] in float32, into a network's input where they lie."""
    scale, shift = _on(levels, rows.device)
    rows.mul_(scale).sub_(shift)  # two operations: one would be rounded once


@lru_cache(64)
def _on(levels: Levels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift [C, 1, 1] on a device; kept, because moving them waits for the device."""
    scale, shift = (
        torch.tensor(each, dtype=torch.float32, device=device)[:, None, None]
        for each in (levels.scale, levels.shift)
    )
    return scale, shift
