"""PyTorch on the CPU: the program's interpreter over oneDNN's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program, ProgramModule
from service.serving.backends.base import Description, Precision, Streams
from service.serving.backends.choices import Choices, choice_key
from service.serving.backends.machine import cpu_name
from service.serving.backends.prepacked import PrepackedModule
from service.serving.backends.rows import (
    as_outputs,
    checked_sizes,
    computing_dtype,
    computing_program,
    first_line,
    random_rows,
    signature,
    warm_up,
)

# Channels-last gained nothing on one row and up to 1.3 times on 32 where it was tried, and lost on
# other machines: so it is measured here, at one row and at this many (or the largest batch).
MEASURED_ROWS = 8

# Threads wait for each other in every layer, so on cores that others want too they cost more than a
# few quiet measurements show: they must win by this much to be used.
THREADS_MARGIN = 0.15


@dataclass(frozen=True)
class _Way:
    """One way to run the program."""

    module: ProgramModule
    layout: torch.memory_format
    name: str


class TorchCpu:
    """A program on the CPU in float32 or bfloat16, in the fastest of three ways to lay it out, on
    one thread or on all.

    Any number of rows up to the largest prepared size runs as it is, without padding. Raises
    BackendFailed for other precisions.
    """

    def __init__(
        self,
        program: Program,
        precision: Precision,
        batch_sizes: Sequence[int],
        choices: Choices | None = None,
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise BackendFailed(
                f"{precision} is not computed by PyTorch on a CPU; float32 and bfloat16 are.",
                remedy="Choose another precision in `config`, or the backend `auto`.",
            )
        rows = signature(program)
        self.inputs, self.outputs = rows.inputs, rows.outputs
        self.batch_sizes = checked_sizes(batch_sizes)
        self.streams: Streams | None = None
        self._precision = precision
        self._dtypes = [computing_dtype(spec, precision) for spec in self.inputs]
        self._choices = choices or Choices()
        self._threads = torch.get_num_threads()
        self._notes: tuple[str, ...] = ()
        planar = computing_program(program, precision, torch.contiguous_format)
        self._bytes = planar.weight_bytes
        self._way: _Way | None = _Way(
            ProgramModule(planar), torch.contiguous_format, "contiguous_format"
        )
        self._undecided: Program | None = program

    def warm(self) -> Iterator[None]:
        """Choose the number of threads and the layout, then run every prepared size."""
        self._threads = torch.get_num_threads()  # a thread has its own number
        if self._undecided is not None and self._way is not None:
            yield from self._choose_threads(self._undecided, self._way)
            if any(len(spec.shape) == 3 for spec in self.inputs):
                yield from self._choose_layout(self._undecided, self._way)
            self._undecided = None
        yield from warm_up(self)

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        if self._way is None:
            raise BackendFailed("The program was unloaded.")
        return self._run(batch, self._way, self._threads)

    def describe(self) -> Description:
        """Threads and layout as `warm` chose them; before, all threads and contiguous layout."""
        return Description(
            backend="torch",
            backend_version=str(torch.__version__),
            device=cpu_name(),
            place="cpu",
            precision=self._precision,
            threads=self._threads,
            layout=self._way.name if self._way is not None else "",
            batch_sizes=self.batch_sizes,
            weight_bytes=self._bytes,
            notes=self._notes,
        )

    def close(self) -> None:
        """Let the weights go, packed ones too; a later `run` raises BackendFailed."""
        self._way = None

    def _run(self, batch: tuple[Tensor, ...], way: _Way, threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        if threads != before:  # a tenth of a microsecond
            torch.set_num_threads(threads)
        try:
            with torch.inference_mode():
                rows = [
                    column.to(dtype, memory_format=way.layout)
                    if column.dim() == 4
                    else column.to(dtype)
                    for column, dtype in zip(batch, self._dtypes, strict=True)
                ]
                return as_outputs(way.module(*rows))
        finally:
            if threads != before:
                torch.set_num_threads(before)

    def _batches(self) -> list[tuple[Tensor, ...]]:
        sizes = sorted({1, min(MEASURED_ROWS, self.batch_sizes[-1])})
        return [random_rows(self.inputs, size) for size in sizes]

    def _choose_threads(self, program: Program, way: _Way) -> Iterator[None]:
        everything = self._threads
        if everything == 1:
            return
        one, all_ = "1 thread", f"{everything} threads"
        choice = yield from self._choices.choose(
            choice_key("torch threads", program, everything, self._precision, self.batch_sizes),
            {
                one: lambda batch: self._run(batch, way, 1),
                all_: lambda batch: self._run(batch, way, everything),
            },
            self._batches(),
            margin=THREADS_MARGIN,
        )
        self._threads = 1 if choice.name == one else everything
        self._notes += (f"{all_} took {choice.relative[all_]:.2f} of {one}",)

    def _choose_layout(self, program: Program, planar: _Way) -> Iterator[None]:
        last = computing_program(program, self._precision, torch.channels_last)
        ways = {
            "contiguous_format": planar,
            "channels_last": _Way(ProgramModule(last), torch.channels_last, "channels_last"),
        }
        try:
            packed = PrepackedModule(last)
            ways["prepacked"] = _Way(packed, torch.channels_last, "prepacked")
        except (RuntimeError, AttributeError) as error:  # not every build of PyTorch has oneDNN
            self._notes += (f"prepacking is not possible: {first_line(error)}",)
        batches = self._batches()
        for name, way in list(ways.items()):
            try:
                self._run(batches[-1], way, self._threads)
            except RuntimeError as error:  # a reshape that is only possible in one memory format
                self._notes += (f"{name} is not possible: {first_line(error)}",)
                del ways[name]
            yield
        threads = self._threads

        def runner(way: _Way) -> Callable[[tuple[Tensor, ...]], object]:
            return lambda batch: self._run(batch, way, threads)

        choice = yield from self._choices.choose(
            choice_key("torch layout", program, threads, self._precision, self.batch_sizes),
            {name: runner(way) for name, way in ways.items()},
            batches,
        )
        self._notes += tuple(
            f"{name} took {share:.2f} of contiguous_format"
            for name, share in choice.relative.items()
            if name != "contiguous_format"
        )
        self._way = ways[choice.name]
