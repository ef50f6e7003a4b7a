"""PyTorch on the CPU: the program's interpreter over oneDNN's kernels."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program, ProgramModule
from service.serving.backends.base import Description, Precision
from service.serving.backends.choose import fastest
from service.serving.backends.rows import (
    as_outputs,
    checked_sizes,
    computing_dtype,
    computing_program,
    random_rows,
    signature,
    warm_up,
)

# Channels-last gained nothing on one row and up to 1.3 times on 32 where it was tried, and lost on
# other machines: so it is measured here, at one row and at this many (or the largest batch).
MEASURED_ROWS = 8


class TorchCpu:
    """A program on the CPU in float32 or bfloat16, in the faster of two memory formats.

    Any number of rows up to the largest prepared size runs as it is, without padding. Raises
    BackendFailed for other precisions.
    """

    def __init__(self, program: Program, precision: Precision, batch_sizes: Sequence[int]) -> None:
        if precision not in ("float32", "bfloat16"):
            raise BackendFailed(
                f"{precision} is not computed on a CPU; float32 and bfloat16 are.",
                remedy="Choose another precision in `config`.",
            )
        rows = signature(program)
        self.inputs, self.outputs = rows.inputs, rows.outputs
        self.batch_sizes = checked_sizes(batch_sizes)
        self._precision = precision
        self._dtypes = [computing_dtype(spec, precision) for spec in self.inputs]
        self._layout = torch.contiguous_format
        self._threads = torch.get_num_threads()
        self._notes: tuple[str, ...] = ()
        planar = computing_program(program, precision, torch.contiguous_format)
        self._bytes = planar.weight_bytes
        self._module: ProgramModule | None = ProgramModule(planar)
        images = any(len(spec.shape) == 3 for spec in self.inputs)
        self._undecided: Program | None = program if images else None

    def warm(self) -> Iterator[None]:
        """Choose the memory format, then run every prepared size."""
        self._threads = torch.get_num_threads()  # a thread has its own number
        if self._undecided is not None and self._module is not None:
            yield from self._choose_layout(self._module, self._undecided)
            self._undecided = None
        yield from warm_up(self)

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        return self._run(batch, self._module, self._layout)

    def describe(self) -> Description:
        return Description(
            backend="torch",
            backend_version=str(torch.__version__),
            device=cpu_name(),
            place="cpu",
            precision=self._precision,
            threads=self._threads,
            layout=str(self._layout).removeprefix("torch."),
            batch_sizes=self.batch_sizes,
            weight_bytes=self._bytes,
            notes=self._notes,
        )

    def close(self) -> None:
        self._module = None

    def _run(
        self,
        batch: tuple[Tensor, ...],
        module: ProgramModule | None,
        layout: torch.memory_format,
    ) -> tuple[Tensor, ...]:
        if module is None:
            raise BackendFailed("The program was unloaded.")
        with torch.inference_mode():
            rows = [
                column.to(dtype, memory_format=layout) if column.dim() == 4 else column.to(dtype)
                for column, dtype in zip(batch, self._dtypes, strict=True)
            ]
            return as_outputs(module(*rows))

    def _choose_layout(self, planar: ProgramModule, program: Program) -> Iterator[None]:
        last = ProgramModule(computing_program(program, self._precision, torch.channels_last))
        candidates = {
            "contiguous": lambda batch: self._run(batch, planar, torch.contiguous_format),
            "channels_last": lambda batch: self._run(batch, last, torch.channels_last),
        }
        sizes = sorted({1, min(MEASURED_ROWS, self.batch_sizes[-1])})
        batches = [random_rows(self.inputs, size) for size in sizes]
        try:
            name, relative = yield from fastest(candidates, batches)
        except RuntimeError as error:  # a reshape that is only possible in one memory format
            self._notes = (f"channels-last is not possible: {error}",)
            return
        self._notes = (f"channels-last took {relative['channels_last']:.2f} of contiguous",)
        if name == "channels_last":
            self._module, self._layout = last, torch.channels_last


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
