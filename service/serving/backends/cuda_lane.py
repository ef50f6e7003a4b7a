"""One of several ways onto a CUDA device: a stream, memory of its own, and captured graphs.

While one lane computes, the next batch of another is copied to the device: the copies cost no time
of their own then. Lanes share the weights and nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from service.serving.backends.parts import BatchPart, Levels, normalise
from service.serving.backends.rows import RowSpec, is_image

Forward = Callable[[list[Tensor]], tuple[Tensor, ...]]
"""A network on its device: from the inputs, as callers send them, to outputs in float32."""

_FLAGS = threading.Lock()
_WARM_UPS = 3


@dataclass(frozen=True)
class _Captured:
    """One batch size: its graph and the device tensors that it writes."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


class Lane:
    """Room on `device` for `largest` rows of `inputs`, in which `forward` runs.

    `forward` may be exchanged until the first capture. One thread at a time. Raises RuntimeError
    when the memory is not there.
    """

    def __init__(
        self, device: torch.device, inputs: Sequence[RowSpec], largest: int, tf32: bool
    ) -> None:
        self.forward: Forward | None = None
        self._tf32 = tf32
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[int, _Captured] = {}
        self._staging = [
            torch.zeros((largest, *spec.shape), dtype=spec.dtype, pin_memory=True)
            for spec in inputs
        ]
        self._places = [torch.zeros_like(staged, device=device) for staged in self._staging]
        self._staged_levels, self._levels = None, None
        if is_image(inputs):
            channels, height, width = inputs[0].shape
            self._staged_levels = torch.zeros(
                (largest, height, width, channels), dtype=torch.uint8, pin_memory=True
            )
            self._levels = torch.zeros_like(self._staged_levels, device=device)
        # Zeros and weights were written on this thread's stream, and another one reads them.
        torch.cuda.synchronize(device)

    def capture(self, size: int) -> None:
        """Record what `forward` does for `size` rows, to be repeated without asking again.

        Raises RuntimeError when something in it cannot be recorded.
        """
        with torch.inference_mode(), arithmetic(self._tf32):
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # algorithms are chosen and workspaces made here
                    self._compute(size)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = self._compute(size)
        self._captured[size] = _Captured(graph, outputs)

    def run(self, parts: Sequence[BatchPart], size: int) -> tuple[Tensor, ...]:
        """Outputs on the CPU for all rows of `parts`, computed as a batch of `size`."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            rows = self._place(parts)
            if captured := self._captured.get(size):
                captured.graph.replay()
                outputs = captured.outputs
            else:
                with arithmetic(self._tf32):
                    outputs = self._compute(rows)
            answers = [
                torch.empty((rows, *o.shape[1:]), dtype=o.dtype, pin_memory=True) for o in outputs
            ]
            # Copies that wait: any other leaves an event to be recorded when the answer is let go,
            # which aborts the process if the device is lost by then.
            for answer, output in zip(answers, outputs, strict=True):
                answer.copy_(output[:rows])
            self._stream.synchronize()
        return tuple(answers)

    def repeat(self, size: int) -> None:
        """Replay what was captured for `size` rows on those that lie there, to the end."""
        with torch.cuda.stream(self._stream):
            self._captured[size].graph.replay()
            self._stream.synchronize()

    def forget(self) -> None:
        """Let all graphs go; what runs next runs operator by operator."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def _compute(self, rows: int) -> tuple[Tensor, ...]:
        assert self.forward is not None
        return self.forward([place[:rows] for place in self._places])

    def _place(self, parts: Sequence[BatchPart]) -> int:
        """Bring all rows to the device, through pinned memory; how many there are."""
        start = 0
        for levels, some in groupby(parts, key=lambda part: part.levels):
            group = list(some)
            stop = start + sum(map(len, group))
            if levels is None:
                for column, (staged, place) in enumerate(
                    zip(self._staging, self._places, strict=True)
                ):
                    _move([part.columns[column] for part in group], staged, place, start, stop)
            else:
                self._place_levels(levels, [part.columns[0] for part in group], start, stop)
            start = stop
        return start

    def _place_levels(self, levels: Levels, columns: list[Tensor], start: int, stop: int) -> None:
        assert self._staged_levels is not None
        assert self._levels is not None
        _move(columns, self._staged_levels, self._levels, start, stop)
        rows = self._places[0][start:stop]
        rows.copy_(self._levels[start:stop].permute(0, 3, 1, 2))
        normalise(rows, levels)


def _move(columns: list[Tensor], staged: Tensor, place: Tensor, start: int, stop: int) -> None:
    first = start
    for column in columns:
        staged[first : first + len(column)].copy_(column)
        first += len(column)
    place[start:stop].copy_(staged[start:stop], non_blocking=True)


@contextmanager
def arithmetic(tf32: bool) -> Iterator[None]:
    """PyTorch's flags for what is computed or captured inside; a replay needs none.

    They are the process's, so one thread at a time has them. Only the older names are used: while
    the newer ones say something else, PyTorch refuses to answer by the older, and `torch.export`
    asks by those.
    """
    products = torch.backends.cuda.matmul
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=True, deterministic=False, allow_tf32=tf32
    )
    with _FLAGS, flags:
        before = products.allow_tf32
        products.allow_tf32 = tf32
        try:
            yield
        finally:
            products.allow_tf32 = before
