"""OpenVINO on the CPU: measured faster than PyTorch, above all when other processes want the cores.

A batch with at least one row per core is cut into one piece per core, each run by one thread: no
thread ever waits for another inside the network, which costs nothing on a quiet machine (1.00 times
the latency at batch 8 on 2 cores) and gains under contention (1.2 to 1.6 times as fast at batch 8
and 2 there). Fewer rows than cores are run by all cores together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, export

from service.errors import BackendFailed
from service.graph import Program, ProgramModule
from service.serving.backends.base import Description, Precision, Prepared
from service.serving.backends.rows import (
    checked_sizes,
    signature,
    warm_up,
)
from service.serving.backends.torch_cpu import cpu_name

_EXPORTING = Lock()  # torch.export does not promise to work in two threads at once

PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def is_installed() -> bool:
    """Whether the optional `openvino` package is here."""
    return find_spec("openvino") is not None


class OpenVinoBackend:
    """Runs programs with OpenVINO on `cpu`."""

    name = "openvino"

    def prepare(
        self, program: Program, device: str, precision: Precision, batch_sizes: Sequence[int]
    ) -> Prepared:
        """Convert and compile `program`; dynamic in the batch axis, so nothing is padded.

        Raises BackendFailed for a device other than `cpu`, a precision other than float32 and
        bfloat16, or a program that OpenVINO cannot convert.
        """
        if device != "cpu":
            raise BackendFailed(
                f"The openvino backend runs on `cpu`, not on {device!r}.",
                remedy="Use the backend `torch` on this device.",
            )
        if precision not in PRECISIONS:
            raise BackendFailed(
                f"{precision} is not computed by the openvino backend; float32 and bfloat16 are.",
                remedy="Choose another precision in `config`.",
            )
        return _OpenVino(program, precision, batch_sizes)


class _OpenVino:
    def __init__(self, program: Program, precision: Precision, batch_sizes: Sequence[int]) -> None:
        rows = signature(program)
        self.inputs, self.outputs = rows.inputs, rows.outputs
        self.batch_sizes = checked_sizes(batch_sizes)
        self._precision = precision
        self._bytes = program.weight_bytes
        openvino = _openvino()
        self._version = str(openvino.__version__)
        self._streams = 1
        self._core = openvino.Core()
        self._model: Any = _converted(program)
        self._together: Any = None
        self._apart: list[Any] = []

    def warm(self) -> Iterator[None]:
        """Compile for this thread's number of CPU threads, then run every prepared size."""
        self._streams = torch.get_num_threads()
        self._together = self._requests("LATENCY", 1)[0]
        yield
        if 1 < self._streams <= self.batch_sizes[-1] and self._model is not None:
            self._apart = self._requests("THROUGHPUT", self._streams)
            yield
        self._model = None  # compiled: the graph and its copy of the weights are not needed
        yield from warm_up(self)

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        if self._together is None:
            raise BackendFailed("The program is not warm, or was unloaded.")
        rows = [column.contiguous() for column in batch]
        if not self._apart or len(rows[0]) < self._streams:
            self._together.infer([column.numpy() for column in rows], share_inputs=True)
            return self._answers([self._together])
        cut = [torch.tensor_split(column, self._streams) for column in rows]
        pieces = [[part.numpy() for part in parts] for parts in zip(*cut, strict=True)]
        started: list[Any] = []
        errors: list[Exception] = []
        try:
            for request, piece in zip(self._apart, pieces, strict=True):
                request.start_async(piece, share_inputs=True)
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

    def describe(self) -> Description:
        layout = f"{self._streams} x 1 thread" if self._apart else f"1 x {self._streams} threads"
        return Description(
            backend="openvino",
            backend_version=self._version,
            device=cpu_name(),
            place="cpu",
            precision=self._precision,
            threads=self._streams,
            layout=layout,
            batch_sizes=self.batch_sizes,
            weight_bytes=self._bytes,
        )

    def close(self) -> None:
        self._model = self._together = None
        self._apart = []

    def _answers(self, requests: Sequence[Any]) -> tuple[Tensor, ...]:
        """The requests' outputs joined by rows; copied, because a request reuses its memory."""
        joined = []
        for index, spec in enumerate(self.outputs):
            parts = [torch.from_numpy(r.get_output_tensor(index).data) for r in requests]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
            joined.append(whole.to(spec.dtype))  # it has no type of its own for truth values
        return tuple(joined)

    def _requests(self, mode: str, count: int) -> list[Any]:
        # Said outright, because on some processors OpenVINO's own choice is bfloat16.
        types = {"float32": _openvino().Type.f32, "bfloat16": _openvino().Type.bf16}
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": mode,
            "INFERENCE_PRECISION_HINT": types[self._precision],
            "INFERENCE_NUM_THREADS": self._streams,
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
    float32 = program.to("float32")
    example = tuple(
        torch.zeros(spec.sized(2), dtype=getattr(torch, spec.dtype)) for spec in float32.inputs
    )
    batch = Dim("batch", min=1, max=1 << 16)
    shapes = tuple({0: batch} for _ in example)
    try:
        with _EXPORTING:
            exported = export(ProgramModule(float32), example, dynamic_shapes={"inputs": shapes})
        return _openvino().convert_model(exported)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendFailed(
            f"OpenVINO could not convert the program: {first}",
            remedy="Use the backend `torch`, which runs every program.",
        ) from error
