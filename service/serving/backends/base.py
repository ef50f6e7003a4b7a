"""What an execution backend is: it prepares a program once, then runs batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from service.graph import Program
    from service.serving.backends.parts import BatchPart
    from service.serving.backends.rows import RowSpec

Precision = Literal["float32", "tf32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class Description:
    """How a prepared program runs, for `/health`, the benchmark and the version's resource.

    `device` is the name a person knows (`AMD EPYC 9B14`, `NVIDIA H200`), `place` the torch device
    string (`cpu`, `cuda:0`), `threads` the CPU threads that one run may use, `layout` the memory
    format that was chosen and `notes` what else was decided while preparing, with the reason.
    `candidates` are the engines that were measured, with their latency over that of the first, and
    `accuracy` how well the one that runs agrees with PyTorch in float32; empty where there was
    nothing to choose or to check.
    """

    backend: str
    backend_version: str
    device: str
    place: str
    precision: Precision
    threads: int
    layout: str
    batch_sizes: tuple[int, ...]
    weight_bytes: int
    notes: tuple[str, ...] = ()
    candidates: Mapping[str, float] = field(default_factory=dict)
    accuracy: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return vars(self) | {
            "batch_sizes": list(self.batch_sizes),
            "notes": list(self.notes),
            "candidates": dict(self.candidates),
            "accuracy": dict(self.accuracy),
        }


@dataclass(frozen=True)
class Streams:
    """A way to run several batches at once, with one CPU thread each.

    `run` is like `Prepared.run`, may be called by any thread, and by up to `count` at once; never
    while `Prepared.run` runs. `rows` is the smallest batch that computes as many rows a second as a
    larger one does: taking more only makes the first of them wait for the last.

    `parts` does the same with rows as they came from their callers, without joining them first, and
    takes grey levels; None where rows are joined for `run`. Where it is given, the device does the
    sharing out, and few rows gain nothing by having it to themselves.
    """

    count: int
    rows: int
    run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    parts: Callable[[Sequence[BatchPart]], tuple[Tensor, ...]] | None = None


class Prepared(Protocol):
    """A program on its device; made by any thread, then warmed and used by one at a time.

    `inputs` and `outputs` say name, shape and dtype of one row of each. `batch_sizes` ascend; `run`
    takes any number of rows up to the last of them. `streams` are known once it is warm; None where
    a run needs the device to itself. With streams, any thread may call `run`.
    """

    @property
    def inputs(self) -> tuple[RowSpec, ...]:
        """Name, shape and dtype of one row of each input, in the order that `run` takes."""
        ...

    @property
    def outputs(self) -> tuple[RowSpec, ...]:
        """Name, shape and dtype of one row of each output, in the order that `run` gives."""
        ...

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The prepared numbers of rows, ascending; the last is the most that `run` takes."""
        ...

    @property
    def streams(self) -> Streams | None:
        """How to run several batches at once; None before `warm`, or where that is not possible."""
        ...

    def warm(self) -> Iterator[None]:
        """Make it ready, in steps short enough that other programs can run in between.

        Chooses what has to be measured and runs every prepared size, so that no request pays for a
        first time. Raises BackendFailed when the outputs do not have one row for each input row.
        """
        ...

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs of a batch on the CPU, each [N, ...] float32 if floating.

        `batch` has one tensor [N, *shape] for each of `inputs`, in their order.

        The caller owns them: a later run never overwrites them.
        """
        ...

    def describe(self) -> Description:
        """How it runs; `warm` may still change threads, layout, notes and what was measured."""
        ...

    def close(self) -> None:
        """Give the memory back; the object must not be used afterwards."""
        ...


class Backend(Protocol):
    """A way to execute programs."""

    @property
    def name(self) -> str:
        """The name by which `config` chooses it."""
        ...

    def prepare(
        self,
        program: Program,
        device: str,
        precision: Precision,
        batch_sizes: Sequence[int],
        calibration: tuple[Tensor, ...] | None = None,
    ) -> Prepared:
        """Load `program` onto `device` for up to `max(batch_sizes)` rows at once; not yet warm.

        `calibration` are rows of the user's, [N, *shape] for each input, from which int8 takes the
        ranges of its activations. Nothing else is computed here, so that it may run beside a device
        that serves.

        Raises BackendFailed when the program, the device or the precision is not possible here.
        """
        ...
