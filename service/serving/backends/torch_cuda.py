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
from service.serving.backends.base import Description, Precision, Streams
from service.serving.backends.rows import (
    as_outputs,
    checked_sizes,
    computing_dtype,
    computing_program,
    first_line,
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
        self.streams: Streams | None = None
        self._device = torch.device(device)
        self._precision = precision
        self._dtypes = [computing_dtype(spec, precision) for spec in self.inputs]
        images = any(len(spec.shape) == 3 for spec in self.inputs)
        self._layout = torch.channels_last if images else torch.contiguous_format
        self._threads = torch.get_num_threads()
        self._notes: tuple[str, ...] = ()
        self._captured: dict[int, _Captured] = {}
        self._module: ProgramModule | None = None
        self._staging: list[Tensor] = []
        self._input: list[Tensor] = []
        computing = computing_program(program, precision, self._layout)
        self._bytes = computing.weight_bytes
        try:
            self._allocate(computing)
        except RuntimeError as error:  # out of memory, or a device that is lost or not there
            self.close()
            raise BackendFailed(
                f"The program does not fit onto {device}: {first_line(error)}",
                remedy="Unload other models, lower FOLDSERVE_MAX_BATCH, or use a larger device.",
            ) from error

    def _allocate(self, computing: Program) -> None:
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._module = ProgramModule(computing).to(self._device)
        largest = self.batch_sizes[-1]
        self._staging = [
            torch.zeros((largest, *spec.shape), dtype=spec.dtype, pin_memory=True)
            for spec in self.inputs
        ]
        self._input = [torch.zeros_like(staged, device=self._device) for staged in self._staging]
        # Zeros and weights were written on this thread's stream, and another one reads them.
        torch.cuda.synchronize(self._device)

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
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for column, staging, place in zip(batch, self._staging, self._input, strict=True):
                staging[:rows].copy_(column)
                place[:rows].copy_(staging[:rows], non_blocking=True)
            if captured := self._captured.get(size):
                captured.graph.replay()
                outputs = captured.outputs
            else:
                with self._arithmetic():
                    outputs = self._forward(rows)
            answers = [
                torch.empty((rows, *o.shape[1:]), dtype=o.dtype, pin_memory=True) for o in outputs
            ]
            for answer, output in zip(answers, outputs, strict=True):
                answer.copy_(output[:rows], non_blocking=True)
            self._stream.synchronize()
        return tuple(answers)

    def describe(self) -> Description:
        """`notes` tell when graphs could not be captured, so that the program runs eagerly."""
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
        """Free graphs, weights and staging memory; a later `run` raises BackendFailed."""
        self._module = None
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()
        self._staging, self._input = [], []
        if torch.cuda.is_available():
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
                torch.cuda.empty_cache()
                self._notes = (f"runs eagerly: CUDA graph capture failed ({first_line(error)})",)
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
        """PyTorch's flags for what is computed or captured inside; a replay needs none."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.benchmark, cudnn.conv.fp32_precision, matmul.fp32_precision  # type: ignore[attr-defined]
        wanted = "tf32" if self._precision == "tf32" else "ieee"
        _set_arithmetic(True, wanted, wanted)
        try:
            yield
        finally:
            _set_arithmetic(*before)


def _set_arithmetic(benchmark: bool, convolutions: str, products: str) -> None:
    # One setting each, by the names of torch 2.9 and later: the older ones may not be mixed in.
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cudnn.conv.fp32_precision = convolutions  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = products
