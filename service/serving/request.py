"""One request on its way through the batcher, and the answer it gets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from service.serving.backends.parts import BatchPart

Column: TypeAlias = "Tensor | NDArray[Any]"
Outputs: TypeAlias = "tuple[NDArray[Any], ...]"
"""Each [N, ...], in the program's order."""
Rows: TypeAlias = "Column | tuple[Column, ...] | Mapping[str, Column] | BatchPart"
"""Rows of a request: one array [N, ...] where the program has one input, else one for each input,
in order or by name; or grey levels of an image input, as a part with `levels`."""


class Timing(NamedTuple):
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
        return self._asdict()


class Result(NamedTuple):
    """The rows that one caller asked for: `outputs` each [N, ...], in the program's order."""

    outputs: Outputs
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
        "count",
        "deadline",
        "future",
        "gone",
        "loop",
        "parts",
        "rows",
        "started",
        "taken",
    )

    def __init__(
        self,
        rows: BatchPart,
        future: asyncio.Future[Result],
        deadline: float,
        now: float,
    ) -> None:
        self.rows = rows
        self.count = len(rows)
        self.future = future
        self.loop = future.get_loop()
        self.arrived = now
        self.deadline = deadline
        self.taken = 0
        self.gone = False
        self.started = 0.0
        self.compute_seconds = 0.0
        self.batch_rows = 0
        self.batches = 0
        self.parts: dict[int, Outputs] = {}

    def __len__(self) -> int:
        return self.count

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return self.count - self.taken

    def add(self, start: int, outputs: Outputs, seconds: float, batch_rows: int) -> Result | None:
        """Record the outputs of the rows from `start`; the whole result once all rows have some."""
        self.compute_seconds += seconds
        self.batch_rows = max(self.batch_rows, batch_rows)
        self.batches += 1
        if len(outputs[0]) < self.count:
            self.parts[start] = outputs
            if sum(len(part[0]) for part in self.parts.values()) < self.count:
                return None
            # Batches that run at once may end in any order.
            parts = [self.parts[start] for start in sorted(self.parts)]
            outputs = tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        waited = self.started - self.arrived
        return Result(outputs, Timing(waited, self.compute_seconds, self.batch_rows, self.batches))


Answer: TypeAlias = "tuple[Request, Result | Exception]"


@dataclass(slots=True, eq=False)
class Slice:
    """Rows `start:stop` of a request, as taken into one batch."""

    request: Request
    start: int
    stop: int

    @property
    def rows(self) -> BatchPart:
        """Its part of each input, [stop - start, ...], as views of the request's rows."""
        whole = self.request.rows
        if self.stop - self.start == self.request.count:
            return whole
        cut = tuple(column[self.start : self.stop] for column in whole.columns)
        return BatchPart(cut, whole.levels)

    def __len__(self) -> int:
        return self.stop - self.start


def monotonic() -> float:
    """Seconds on the clock that deadlines are given in (`time.monotonic`)."""
    return time.monotonic()
