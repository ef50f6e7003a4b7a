"""PyTorch on a CUDA device: channels-last, one captured graph per prepared batch size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program, ProgramModule
from service.serving.backends.base import Description, Precision
from service.serving.backends.choices import Choices
from service.serving.backends.rows import (
    as_outputs,
    checked_sizes,
    computing_dtype,
    computing_program,
    padded_size,
    signature,
    warm_up,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Captured:
    """One batch size: its graph and the device tensors that it writes."""

    graph: torch.cuda.CUDAGraph
    outputs: tuple[Tensor, ...]


class TorchCuda:
    """A program on one CUDA device.

    Rows go through one pinned buffer to a fixed place on the device; a batch is padded to the next
    prepared size, whose captured graph is replayed. A program that cannot be captured runs eagerly
    and says so in `describe().notes`. `float32` means float32: PyTorch's default of TF32 inside
    convolutions is switched off unless `tf32` was asked for.
    """

    def __init__(
        self,
        program: Program,
        device: str,
        precision: Precision,
        batch_sizes: Sequence[int],
        choices: Choices | None = None,
    ) -> None:
        if precision == "int8":
            raise BackendFailed(
                "int8 is not computed by PyTorch.", remedy="Choose another precision in `config`."
            )
        if not torch.cuda.is_available():
            raise BackendFailed("There is no CUDA device here.", remedy="Use the device `cpu`.")
        rows = signature(program)
        self.inputs, self.outputs = rows.inputs, rows.outputs
        self.batch_sizes = checked_sizes(batch_sizes)
        self._device = torch.device(device)
        self._precision = precision
        self._dtypes = [computing_dtype(spec, precision) for spec in self.inputs]
        images = any(len(spec.shape) == 3 for spec in self.inputs)
        self._layout = torch.channels_last if images else torch.contiguous_format
        self._choices = choices or Choices()
        self._threads = torch.get_num_threads()
        self._notes: tuple[str, ...] = ()
        computing = computing_program(program, precision, self._layout)
        self._bytes = computing.weight_bytes
        self._module: ProgramModule | None = ProgramModule(computing).to(self._device)
        largest = self.batch_sizes[-1]
        self._staging = [
            torch.zeros((largest, *spec.shape), dtype=spec.dtype, pin_memory=True)
            for spec in self.inputs
        ]
        self._input = [torch.zeros_like(staged, device=self._device) for staged in self._staging]
        self._captured: dict[int, _Captured] = {}
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def warm(self) -> Iterator[None]:
        """Capture a graph per prepared size, then run every one of them."""
        self._threads = torch.get_num_threads()  # a thread has its own number
        yield from self._capture()
        yield from warm_up(self)

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        if self._module is None:
            raise BackendFailed("The program was unloaded.")
        rows = len(batch[0])
        size = padded_size(self.batch_sizes, rows)
        with torch.inference_mode(), torch.cuda.stream(self._stream), self._arithmetic():
            for column, staging, place in zip(batch, self._staging, self._input, strict=True):
                staging[:rows].copy_(column)
                place[:rows].copy_(staging[:rows], non_blocking=True)
            if captured := self._captured.get(size):
                captured.graph.replay()
                outputs = captured.outputs
            else:
                outputs = self._forward(rows)
            answers = [
                torch.empty((rows, *o.shape[1:]), dtype=o.dtype, pin_memory=True) for o in outputs
            ]
            for answer, output in zip(answers, outputs, strict=True):
                answer.copy_(output[:rows], non_blocking=True)
            self._stream.synchronize()
        return tuple(answers)

    def describe(self) -> Description:
        return Description(
            backend="torch",
            backend_version=str(torch.__version__),
            device=torch.cuda.get_device_name(self._device),
            place=str(self._device),
            precision=self._precision,
            threads=self._threads,
            layout=str(self._layout).removeprefix("torch."),
            batch_sizes=self.batch_sizes,
            weight_bytes=self._bytes,
            notes=self._notes,
        )

    def close(self) -> None:
        self._module = None
        self._captured.clear()
        torch.cuda.empty_cache()

    def _forward(self, rows: int) -> tuple[Tensor, ...]:
        assert self._module is not None
        batch = [
            place[:rows].to(dtype, memory_format=self._layout)
            if place.dim() == 4
            else place[:rows].to(dtype)
            for place, dtype in zip(self._input, self._dtypes, strict=True)
        ]
        return as_outputs(self._module(*batch))

    def _capture(self) -> Iterator[None]:
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.batch_sizes):  # the largest first, so that the pool fits the rest
            try:
                self._captured[size] = self._captured_graph(size, pool)
            except RuntimeError as error:
                log.warning("CUDA graph capture failed, the program runs eagerly: %s", error)
                self._captured.clear()
                first = str(error).partition("\n")[0]
                self._notes = (f"runs eagerly: CUDA graph capture failed ({first})",)
                return
            yield

    def _captured_graph(self, size: int, pool: Any) -> _Captured:
        with torch.inference_mode(), self._arithmetic():
            with torch.cuda.stream(self._stream):
                for _ in range(3):  # algorithms are chosen and workspaces made here
                    self._forward(size)
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                outputs = self._forward(size)
        return _Captured(graph, outputs)

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        allow = self._precision == "tf32"
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allow
        try:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allow):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
