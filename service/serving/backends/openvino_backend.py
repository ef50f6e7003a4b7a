"""OpenVINO on the CPU: measured faster than PyTorch, above all when other processes want the cores.

A batch with at least one row per core may be cut into one piece per core, each run by one thread:
no thread ever waits for another inside the network, which costs nothing on a quiet machine (1.00
times the latency at batch 8 on 2 cores) and gains under contention (1.2 to 1.6 times as fast at
batch 8 and 2 there). A small network gains nothing from a second thread at all. So the ways are
measured: every core together, one piece a core, or one thread alone.

Where one piece a core is the fastest, the pieces need not belong to one batch: each core is a
stream of its own. How many rows a stream should take at once is measured too: one or a few.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program
from service.graph.exported import to_exported
from service.serving.backends.base import Description, Precision, Prepared, Streams
from service.serving.backends.choices import Choices, choice_key
from service.serving.backends.machine import cpu_name
from service.serving.backends.quantise import quantised
from service.serving.backends.rows import (
    checked_sizes,
    first_line,
    powers_of_two,
    random_rows,
    signature,
    warm_up,
)
from service.serving.backends.torch_cpu import MEASURED_ROWS, THREADS_MARGIN

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "int8")
PIECES_MARGIN = 0.2
"""How much slower than the fastest fewer rows at once may be: they answer sooner, and a long
backlog is taken in larger batches anyway. RepVGG-A0's rows one by one take 1.1 to 1.2 times."""


def is_installed() -> bool:
    """Whether the optional `openvino` package is here."""
    return find_spec("openvino") is not None


class OpenVinoBackend:
    """Runs programs with OpenVINO on `cpu`."""

    name = "openvino"

    def __init__(self, choices: Choices | None = None) -> None:
        self._choices = choices or Choices()

    def prepare(
        self,
        program: Program,
        device: str,
        precision: Precision,
        batch_sizes: Sequence[int],
        calibration: tuple[Tensor, ...] | None = None,
    ) -> Prepared:
        """Convert and compile `program`; dynamic in the batch axis, so nothing is padded.

        For int8 the network is run in float32 on `calibration` here, a few rows at a time. Raises
        BackendFailed for a device other than `cpu`, a precision that it does not compute, a program
        that OpenVINO cannot convert, and int8 without rows to calibrate it.
        """
        if device != "cpu":
            raise BackendFailed(
                f"The openvino backend runs on `cpu`, not on {device!r}.",
                remedy="Use the backend `torch` on this device.",
            )
        if precision not in PRECISIONS:
            raise BackendFailed(
                f"{precision} is not computed by the openvino backend; it has "
                f"{', '.join(PRECISIONS)}.",
                remedy="Choose another precision in `config`.",
            )
        return _OpenVino(program, precision, batch_sizes, self._choices, calibration)


class _OpenVino:
    def __init__(
        self,
        program: Program,
        precision: Precision,
        batch_sizes: Sequence[int],
        choices: Choices,
        calibration: tuple[Tensor, ...] | None,
    ) -> None:
        rows = signature(program)
        self.inputs, self.outputs = rows.inputs, rows.outputs
        self.batch_sizes = checked_sizes(batch_sizes)
        self._precision = precision
        self._bytes = program.weight_bytes
        self._choices = choices
        openvino = _openvino()
        self._version = str(openvino.__version__)
        self._tensor = openvino.Tensor
        self._threads = 1
        self._core = openvino.Core()
        self._model: Any = _converted(program)
        self._notes: tuple[str, ...] = ()
        if precision == "int8":
            self._model, note = quantised(self._model, calibration)
            self._notes = (note,)
        self._program: Program | None = program
        self._together: Any = None
        self._apart: list[Any] = []
        self._few = self._many = "together"
        self.streams: Streams | None = None

    def warm(self) -> Iterator[None]:
        """Compile for this thread's number of CPU threads, choose how to use them, then run every
        prepared size."""
        self._threads = torch.get_num_threads()
        if self._model is not None and self._program is not None:
            self._together = self._requests("LATENCY", 1)[0]
            yield
            if self._threads > 1:
                self._apart = self._requests("THROUGHPUT", self._threads)
                yield
                yield from self._choose_ways(self._program)
            self._model = self._program = None  # compiled: the graph and its weights are not needed
        yield from warm_up(self)

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        return self._run(batch, self._few if len(batch[0]) < self._threads else self._many)

    def describe(self) -> Description:
        how = {
            "together": f"1 x {self._threads} threads",
            "apart": f"{self._threads} x 1 thread",
            "alone": "1 x 1 thread",
        }
        few, many = how[self._few], how[self._many]
        return Description(
            backend="openvino",
            backend_version=self._version,
            device=cpu_name(),
            place="cpu",
            precision=self._precision,
            threads=1 if self._few == self._many == "alone" else self._threads,
            layout=many if few == many else f"{many}; {few} below {self._threads} rows",
            batch_sizes=self.batch_sizes,
            weight_bytes=self._bytes,
            notes=self._notes,
        )

    def close(self) -> None:
        self._model = self._together = self._program = self.streams = None
        self._apart = []

    def _choose_ways(self, program: Program) -> Iterator[None]:
        largest = self.batch_sizes[-1]
        few = yield from self._way(program, "few", ("alone", "together"), 1)
        self._few = self._many = few
        if largest >= self._threads:
            ways = ("apart", "together", "alone")
            self._many = yield from self._way(
                program, "many", ways, max(self._threads, min(MEASURED_ROWS, largest))
            )
        used = {self._few, self._many}
        if self._many == "apart":
            self.streams = yield from self._streams(program)
        if "together" not in used:
            self._together = None
        if used == {"together"}:
            self._apart = []

    def _way(
        self, program: Program, question: str, ways: Sequence[str], rows: int
    ) -> Generator[None, None, str]:
        """The fastest of `ways` for that many rows; the first, which waits least, on a draw."""
        choice = yield from self._choices.choose(
            choice_key(f"openvino {question}", program, self._threads, self._precision, rows),
            {way: partial(self._run, way=way) for way in ways},
            [random_rows(self.inputs, rows)],
            margin=THREADS_MARGIN,
        )
        self._notes += tuple(
            f"{way} took {share:.2f} of {ways[0]} on {rows} rows"
            for way, share in choice.relative.items()
            if way != ways[0]
        )
        return choice.name

    def _streams(self, program: Program) -> Generator[None, None, Streams]:
        """Every core a stream, and the fewest rows that cost it little more than many."""
        free: SimpleQueue[Any] = SimpleQueue()
        for request in self._apart:
            free.put(request)

        def run(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            request = free.get()
            try:
                self._give(request, [column.contiguous() for column in batch])
                request.infer(share_outputs=True)
                return self._answers([request])
            finally:
                free.put(request)

        def in_pieces(batch: tuple[Tensor, ...], rows: int) -> None:
            for piece in zip(*(torch.split(column, rows) for column in batch), strict=True):
                run(piece)

        sizes = powers_of_two(min(MEASURED_ROWS, self.batch_sizes[-1]))
        choice = yield from self._choices.choose(
            choice_key("openvino rows", program, self._threads, self._precision, sizes),
            {str(rows): partial(in_pieces, rows=rows) for rows in sizes},
            [random_rows(self.inputs, sizes[-1])],
            clock=time.process_time,  # one thread's: who else wants the cores does not matter
        )
        best = min(choice.relative.values())
        enough = best * (1 + PIECES_MARGIN)
        rows = min(int(rows) for rows, share in choice.relative.items() if share <= enough)
        self._notes += (f"{len(self._apart)} streams, {rows} rows at a time",)
        return Streams(len(self._apart), rows, run)

    def _run(self, batch: tuple[Tensor, ...], way: str) -> tuple[Tensor, ...]:
        if self._together is None and not self._apart:
            raise BackendFailed("The program is not warm, or was unloaded.")
        rows = [column.contiguous() for column in batch]
        if way != "apart" or len(rows[0]) < len(self._apart):
            request = self._together if way == "together" else self._apart[0]
            self._give(request, rows)
            request.infer(share_outputs=True)
            return self._answers([request])
        cut = [torch.tensor_split(column, len(self._apart)) for column in rows]
        pieces = zip(*cut, strict=True)
        started: list[Any] = []
        errors: list[Exception] = []
        try:
            for request, piece in zip(self._apart, pieces, strict=True):
                self._give(request, piece)
                request.start_async()
                started.append(request)
        finally:  # whatever failed, none may still run when its rows are gone
            for request in started:
                try:
                    request.wait()
                except RuntimeError as error:
                    errors.append(error)
        if errors:
            raise errors[0]
        return self._answers(self._apart)

    def _give(self, request: Any, rows: Sequence[Tensor]) -> None:
        """Let a request read its inputs where they lie.

        Handed to `infer`, they would be looked up, compared and wrapped in Python, and outputs
        copied that `_answers` copies: 57 microseconds of 126 with a network that takes 65.
        """
        for index, column in enumerate(rows):
            request.set_input_tensor(index, self._tensor(column.numpy(), shared_memory=True))

    def _answers(self, requests: Sequence[Any]) -> tuple[Tensor, ...]:
        """The requests' outputs joined by rows; copied, because a request reuses its memory."""
        joined = []
        for index, spec in enumerate(self.outputs):
            parts = [request.get_output_tensor(index).data for request in requests]
            whole = torch.from_numpy(np.concatenate(parts))
            joined.append(whole.to(spec.dtype))  # it has no type of its own for truth values
        return tuple(joined)

    def _requests(self, mode: str, count: int) -> list[Any]:
        # Said outright, because on some processors OpenVINO's own choice is bfloat16.
        bf16 = self._precision == "bfloat16"
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": mode,
            "INFERENCE_PRECISION_HINT": _openvino().Type.bf16 if bf16 else _openvino().Type.f32,
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": count,
        }
        compiled = self._core.compile_model(self._model, "CPU", settings)
        return [compiled.create_infer_request() for _ in range(count)]


def _openvino() -> Any:
    """The package: optional, without type stubs, and a while to import, so only when it is used.

    It reports its use to its makers unless told otherwise; without the package `openvino_telemetry`
    it puts a stub in its place, so that one is hidden from it. Nothing here leaves the host.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return import_module("openvino")


def _converted(program: Program) -> Any:
    try:
        return _openvino().convert_model(to_exported(program.to("float32")))
    except Exception as error:
        raise BackendFailed(
            f"OpenVINO could not convert the program: {first_line(error)}",
            remedy="Use the backend `torch`, which runs every program.",
        ) from error
