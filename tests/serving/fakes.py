"""A prepared program whose rows can be told apart, with a device that can be held up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from service.serving import Description, Result, RowSpec
from service.serving.backends.base import Streams

POISON = -1.0


class Doubler:
    """Answers twice the input and the sum of each row; a batch with a poison row raises.

    `gate` blocks every run until it is set, so that a test decides what the backlog is; `runs`
    records the first column of every batch that was tried. With so many
    `streams`, as many runs may be under way at once; `beside` is the most that were, `alone`
    whether those that needed the device to themselves had it.
    """

    def __init__(
        self,
        largest: int = 8,
        width: int = 3,
        pause: Callable[[], float] = lambda: 0.0,
        mix_rows: bool = False,
        streams: int = 0,
        stream_rows: int = 1,
    ) -> None:
        self.inputs = (RowSpec("input_0", (width,), torch.float32),)
        self.outputs = (
            RowSpec("output_0", (width,), torch.float32),
            RowSpec("output_1", (), torch.float32),
        )
        self.batch_sizes = tuple(sorted({1, largest}))
        self.streams = Streams(streams, stream_rows, self._run_beside) if streams else None
        self.beside = 0
        self.alone = True
        self._running = 0
        self._lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.runs: list[list[float]] = []
        self.threads: set[str] = set()
        self.warmed = False
        self.closed = False
        self._pause = pause
        self._mix_rows = mix_rows

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.alone &= self._running == 0
        outputs = self._compute(inputs)
        self.alone &= self._running == 0
        return outputs

    def _run_beside(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with self._lock:
            self._running += 1
            self.beside = max(self.beside, self._running)
        try:
            return self._compute(inputs)
        finally:
            with self._lock:
                self._running -= 1

    def _compute(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (batch,) = inputs
        self.threads.add(threading.current_thread().name)
        self.runs.append(batch[:, 0].tolist())
        self.started.set()
        assert self.gate.wait(10), "the test forgot to open the gate"
        time.sleep(self._pause())
        if (batch == POISON).any():
            raise ValueError("poison in the batch")
        if self._mix_rows:  # the fault that the identity checks must notice
            batch = batch.flip(0)
        return batch * 2, batch.sum(1)

    def warm(self) -> Iterator[None]:
        self.warmed = True
        yield

    def describe(self) -> Description:
        return Description(
            "fake", "0", "none", "cpu", "float32", 1, "contiguous", self.batch_sizes, 0
        )

    def close(self) -> None:
        self.closed = True


def rows(*values: float, width: int = 3) -> Tensor:
    """One row for each value, filled with it."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1).repeat(1, width)


def is_own(result: Result, values: tuple[float, ...], width: int = 3) -> bool:
    """Whether a result is that of these rows, in this order, and of no others."""
    doubled, total = result.outputs
    expected = np.array(values, dtype=np.float32)
    return np.array_equal(doubled, np.repeat(expected[:, None] * 2, width, 1)) and np.array_equal(
        total, expected * width
    )
