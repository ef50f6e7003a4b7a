"""PyTorch on a CUDA device: the fastest way to lay the network out, captured per batch size."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program, ProgramModule
from service.serving.backends.base import Description, Precision, Streams
from service.serving.backends.choices import Choices, choice_key
from service.serving.backends.cuda_lane import Forward, Lane
from service.serving.backends.epilogues import CudnnModule
from service.serving.backends.parts import BatchPart
from service.serving.backends.rows import (
    as_outputs,
    checked_sizes,
    computing_dtype,
    computing_program,
    first_line,
    padded_size,
    random_rows,
    signature,
    warm_up,
)

log = logging.getLogger(__name__)

LANES = 2
"""Batches under way at once: one computes while the next is copied."""


@dataclass(frozen=True)
class _Way:
    """One way to lay the program out: in which memory format, and by which operators."""

    name: str
    layout: torch.memory_format
    module: type[ProgramModule]


_PLAIN = _Way("contiguous_format", torch.contiguous_format, ProgramModule)
_WAYS = (
    _Way("channels_last", torch.channels_last, ProgramModule),
    _Way("channels_last, fused ReLU", torch.channels_last, CudnnModule),
    _PLAIN,
    _Way("contiguous_format, fused ReLU", torch.contiguous_format, CudnnModule),
)


class TorchCuda:
    """A program on one CUDA device.

    Rows go through pinned memory, images as grey levels where they came so, and are normalised
    there. A batch is padded to the next prepared size, whose captured graph is replayed. Two
    batches are under way at once, so that copies hide behind what is computed. The fastest way to
    lay the program out is measured. One that cannot be captured runs eagerly and says so in
    `describe().notes`. `float32` means float32: PyTorch's default of TF32 inside convolutions is
    switched off unless `tf32` was asked for.
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
        self.streams: Streams | None = None
        self._device = torch.device(device)
        self._precision = precision
        self._dtypes = [computing_dtype(spec, precision) for spec in self.inputs]
        self._choices = choices or Choices()
        self._threads = torch.get_num_threads()
        self._notes: tuple[str, ...] = ()
        self._way = _PLAIN
        self._program: Program | None = program
        self._bytes = computing_program(program, precision, torch.contiguous_format).weight_bytes
        self._lanes: list[Lane] = []
        self._free: SimpleQueue[Lane] = SimpleQueue()
        try:
            self._add_lane()
            self._lanes[0].forward = self._forward(program, self._way)
        except RuntimeError as error:  # out of memory, or a device that is lost or not there
            self.close()
            raise BackendFailed(
                f"The program does not fit onto {device}: {first_line(error)}",
                remedy="Unload other models, lower FOLDSERVE_MAX_BATCH, or use a larger device.",
            ) from error

    def warm(self) -> Iterator[None]:
        """Choose the layout, capture a graph per prepared size and lane, then run each of them."""
        self._threads = torch.get_num_threads()  # a thread has its own number
        program, self._program = self._program, None
        if program is not None:
            if any(len(spec.shape) == 3 for spec in self.inputs):
                yield from self._choose(program)
            self._open_lanes()
            yield from self._capture()
            self.streams = Streams(len(self._lanes), self.batch_sizes[-1], self.run, self._run)
        yield from warm_up(self)  # two runs of each size: one in each lane

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        return self._run([BatchPart(batch)])

    def repeat(self, size: int) -> None:
        """Compute what lies on the device for a prepared `size` again, without any copies.

        For measuring what the copies cost. Raises KeyError for a program that runs eagerly.
        """
        self._lanes[0].repeat(size)

    def _run(self, parts: Sequence[BatchPart]) -> tuple[Tensor, ...]:
        if not self._lanes:
            raise BackendFailed("The program was unloaded.")
        size = padded_size(self.batch_sizes, sum(map(len, parts)))
        lane = self._free.get()
        try:
            return lane.run(parts, size)
        finally:
            self._free.put(lane)

    def describe(self) -> Description:
        """`notes` tell what was measured, and when graphs could not be captured."""
        return Description(
            backend="torch",
            backend_version=str(torch.__version__),
            device=torch.cuda.get_device_name(self._device),
            place=str(self._device),
            precision=self._precision,
            threads=self._threads,
            layout=self._way.name,
            batch_sizes=self.batch_sizes,
            weight_bytes=self._bytes,
            notes=self._notes,
        )

    def close(self) -> None:
        """Free graphs, weights and staging memory; a later `run` raises BackendFailed."""
        for lane in self._lanes:
            lane.forget()
        self._lanes.clear()
        self._free = SimpleQueue()
        self._program = self.streams = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _add_lane(self) -> None:
        self._lanes.append(self._lane())
        self._free.put(self._lanes[-1])

    def _lane(self) -> Lane:
        tf32 = self._precision == "tf32"
        return Lane(self._device, self.inputs, self.batch_sizes[-1], tf32)

    def _open_lanes(self) -> None:
        """As many as there should be, or as there is memory for."""
        try:
            while len(self._lanes) < LANES:
                self._add_lane()
                self._lanes[-1].forward = self._lanes[0].forward
        except RuntimeError as error:
            self._notes += (f"one batch at a time: {first_line(error)}",)

    def _forward(self, program: Program, way: _Way) -> Forward:
        module = way.module(computing_program(program, self._precision, way.layout))
        module.to(self._device)
        torch.cuda.synchronize(self._device)  # the lanes read the weights on streams of their own
        dtypes, layout = self._dtypes, way.layout

        def forward(columns: list[Tensor]) -> tuple[Tensor, ...]:
            batch = [
                column.to(dtype, memory_format=layout) if column.dim() == 4 else column.to(dtype)
                for column, dtype in zip(columns, dtypes, strict=True)
            ]
            return as_outputs(module(*batch))

        return forward

    def _choose(self, program: Program) -> Iterator[None]:
        """Measure every way at one row and at the most, in a lane each, and keep the fastest."""
        sizes = sorted({1, self.batch_sizes[-1]})
        key = choice_key(
            "cuda layout", program, 0, self._precision, self.batch_sizes, str(self._device)
        )
        known = self._choices.get(key)
        trials: dict[str, Lane] = {}
        for way in [w for w in _WAYS if known is not None and w.name == known.name] or _WAYS:
            try:
                trials[way.name] = self._trial(program, way, sizes)
            except RuntimeError as error:  # no room, or something that this way cannot do
                log.info("%s is not possible: %s", way.name, error)
                self._notes += (f"{way.name} is not possible: {first_line(error)}",)
            yield
        if not trials:
            return
        choice = yield from self._choices.choose(
            key, {name: trial.repeat for name, trial in trials.items()}, sizes
        )
        first, *others = trials
        self._notes += tuple(
            f"{name} took {choice.relative[name]:.2f} of {first}"
            for name in others
            if name in choice.relative
        )
        self._way = next(way for way in _WAYS if way.name == choice.name)
        self._lanes[0].forward = trials[choice.name].forward
        trials.clear()
        torch.cuda.empty_cache()

    def _trial(self, program: Program, way: _Way, sizes: Sequence[int]) -> Lane:
        """A lane of its own with the program laid out so, and some rows in it."""
        lane = self._lane()
        lane.forward = self._forward(program, way)
        for size in reversed(sizes):
            lane.capture(size)
        lane.run([BatchPart(random_rows(self.inputs, sizes[-1]))], sizes[-1])
        return lane

    def _capture(self) -> Iterator[None]:
        for lane in self._lanes:
            for size in reversed(self.batch_sizes):  # the largest first: the pool fits the rest
                try:
                    lane.capture(size)
                except RuntimeError as error:
                    log.warning("CUDA graph capture failed, the program runs eagerly: %s", error)
                    for each in self._lanes:
                        each.forget()
                    torch.cuda.empty_cache()
                    why = first_line(error)
                    self._notes += (f"runs eagerly: CUDA graph capture failed ({why})",)
                    return
                yield
