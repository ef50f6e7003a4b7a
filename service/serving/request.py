"""One request on its way through the batcher, and the answer it gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.serving.backends.parts import BatchPart

Column: TypeAlias = "Tensor | NDArray[Any]"
Rows: TypeAlias = "Column | tuple[Column, ...] | Mapping[str, Column] | BatchPart"
"""Rows of a request: one array [N, ...] where the program has one input, else one for each input,
in order or by name; or grey levels of an image input, as a part with `levels`."""


@dataclass(frozen=True)
class Timing:
    """Where the time of a request went.

    `queue_seconds` from arrival to the start of its first batch; `compute_seconds` the device time
    of every batch that held its rows; `batch_rows` the rows of the largest of them, other callers'
    included; `batches` how many there were (more than one if it was split).
    """

    queue_seconds: float
    compute_seconds: float
    batch_rows: int
    batches: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form: every field by its name, times in seconds."""
        return {
            "queue_seconds": self.queue_seconds,
            "compute_seconds": self.compute_seconds,
            "batch_rows": self.batch_rows,
            "batches": self.batches,
        }


@dataclass(frozen=True)
class Result:
    """The rows that one caller asked for: `outputs` each [N, ...], in the program's order."""

    outputs: tuple[NDArray[Any], ...]
    timing: Timing


class Request:
    """Rows waiting for their outputs.

    The backlog's lock guards what changes.
    """

    __slots__ = (
        "arrived",
        "batch_rows",
        "batches",
        "compute_seconds",
        "deadline",
        "future",
        "gone",
        "loop",
        "parts",
        "rows",
        "started",
        "taken",
        "timer",
    )

    def __init__(
        self,
        rows: BatchPart,
        future: asyncio.Future[Result],
        deadline: float,
        now: float,
    ) -> None:
        self.rows = rows
        self.future = future
        self.loop = future.get_loop()
        self.arrived = now
        self.deadline = deadline
        self.timer: asyncio.TimerHandle | None = None
        self.taken = 0
        self.gone = False
        self.started = 0.0
        self.compute_seconds = 0.0
        self.batch_rows = 0
        self.batches = 0
        self.parts: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return len(self) - self.taken

    def add(
        self, start: int, outputs: tuple[Tensor, ...], seconds: float, batch_rows: int
    ) -> Result | None:
        """Record the outputs of the rows from `start`; the whole result once all rows have some."""
        self.parts[start] = outputs
        self.compute_seconds += seconds
        self.batch_rows = max(self.batch_rows, batch_rows)
        self.batches += 1
        if sum(part[0].shape[0] for part in self.parts.values()) < len(self):
            return None
        timing = Timing(
            queue_seconds=self.started - self.arrived,
            compute_seconds=self.compute_seconds,
            batch_rows=self.batch_rows,
            batches=self.batches,
        )
        # Batches that run at once may end in any order.
        parts = [self.parts[start] for start in sorted(self.parts)]
        return Result(tuple(map(_joined, zip(*parts, strict=True))), timing)


def _joined(parts: tuple[Tensor, ...]) -> NDArray[Any]:
    arrays = [np.asarray(part) for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows `start:stop` of a request, as taken into one batch."""

    request: Request
    start: int
    stop: int

    @property
    def rows(self) -> BatchPart:
        """Its part of each input, [stop - start, ...], as views of the request's rows."""
        whole = self.request.rows
        if self.stop - self.start == len(self.request):
            return whole
        cut = tuple(column[self.start : self.stop] for column in whole.columns)
        return BatchPart(cut, whole.levels)

    def __len__(self) -> int:
        return self.stop - self.start


def monotonic() -> float:
    """Seconds on the clock that deadlines are given in (`time.monotonic`)."""
    return time.monotonic()
