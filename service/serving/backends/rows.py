"""What every backend needs to know about the rows that go into a program and come out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program
from service.graph.program import TensorSpec
from service.serving.backends.base import Precision, Prepared


@dataclass(frozen=True)
class RowSpec:
    """An input or an output: its name, the shape of one row, and the dtype in which callers send or
    get it (floating: float32)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def random(self, batch: int, seed: int = 0) -> Tensor:
        """A batch [batch, *shape] to warm up and measure with: normal values, or small integers."""
        random = torch.Generator().manual_seed(seed)
        shape = (batch, *self.shape)
        if self.dtype.is_floating_point:
            return torch.randn(shape, generator=random).to(self.dtype)
        return torch.randint(0, 2, shape, generator=random).to(self.dtype)


@dataclass(frozen=True)
class Signature:
    """The rows that a program takes and gives, in its own order."""

    inputs: tuple[RowSpec, ...]
    outputs: tuple[RowSpec, ...]


def signature(program: Program) -> Signature:
    """The rows of `program`. Raises BackendFailed unless it can be served row by row.

    Inputs have the program's names. Outputs are called `output_0`, `output_1`, …, because the names
    of the values behind them differ between a training form and its deploy form.
    """
    specs = program.specs()
    inputs = tuple(_row_spec("input", spec.name, spec) for spec in program.inputs)
    outputs = tuple(
        _row_spec("output", f"output_{index}", specs[name])
        for index, name in enumerate(program.outputs)
    )
    if not inputs:
        raise BackendFailed("The program has no input, so there are no rows to serve.")
    return Signature(inputs, outputs)


def _row_spec(kind: str, name: str, spec: TensorSpec) -> RowSpec:
    if not spec.shape or spec.shape[0] is not None or None in spec.shape[1:]:
        raise BackendFailed(
            f"The program's {kind} {name} has shape {spec.shape}; only the leading axis may vary, "
            "and each output must have one row for each input row to be served in batches."
        )
    dtype: torch.dtype = getattr(torch, spec.dtype)
    shape = tuple(int(size or 0) for size in spec.shape[1:])
    return RowSpec(name, shape, torch.float32 if dtype.is_floating_point else dtype)


def random_rows(inputs: Sequence[RowSpec], batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """A batch for each input, as `RowSpec.random` makes them, each from a seed of its own."""
    return tuple(spec.random(batch, seed + index) for index, spec in enumerate(inputs))


def is_image(inputs: Sequence[RowSpec]) -> bool:
    """Whether the only input looks like an image: [channels, height, width] of real numbers."""
    return len(inputs) == 1 and len(inputs[0].shape) == 3 and inputs[0].dtype.is_floating_point


def checked_sizes(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes ascending, without repetition. Raises ValueError if there is none to serve with."""
    sizes = tuple(sorted(set(batch_sizes)))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"batch sizes are positive and there is at least one, got {batch_sizes}")
    return sizes


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, … up to and including `largest`."""
    return tuple(sorted({1 << power for power in range(largest.bit_length() - 1)} | {1, largest}))


def computing_program(
    program: Program, precision: Precision, layout: torch.memory_format
) -> Program:
    """The same program in the type that `precision` computes in, 4-d weights laid out anew."""
    cast = program.to(dtype_name(precision))
    return replace(
        cast,
        weights={
            name: tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor
            for name, tensor in cast.weights.items()
        },
    )


def dtype_name(precision: Precision) -> str:
    """The floating-point type that `precision` stores its numbers in."""
    return "float32" if precision == "tf32" else precision


def computing_dtype(spec: RowSpec, precision: Precision) -> torch.dtype:
    """The type in which a program that computes in `precision` takes this input."""
    if not spec.dtype.is_floating_point:
        return spec.dtype
    dtype: torch.dtype = getattr(torch, dtype_name(precision))
    return dtype


def as_outputs(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs as a tuple; floating-point ones as float32."""
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    return tuple(o.float() if o.is_floating_point() else o for o in outputs)


def padded_size(batch_sizes: Sequence[int], rows: int) -> int:
    """The smallest prepared size that holds `rows`. Raises BackendFailed if there is none."""
    for size in batch_sizes:
        if size >= rows:
            return size
    raise BackendFailed(f"{rows} rows were given at once; {batch_sizes[-1]} are prepared for.")


def warm_up(prepared: Prepared) -> Iterator[None]:
    """Run every prepared batch size twice, the largest first, giving way after each run.

    The last is a lone row, as the first request mostly is: an engine that has just run another size
    takes a moment longer. Raises BackendFailed when the outputs do not have one row for each row of
    the input.
    """
    for size in reversed(prepared.batch_sizes):
        batch = random_rows(prepared.inputs, size)
        for _ in range(2):
            outputs = prepared.run(batch)
            yield
        wrong = [list(o.shape) for o in outputs if o.dim() == 0 or o.shape[0] != size]
        if wrong:
            raise BackendFailed(
                f"For {size} input rows the program answers shapes {wrong}; each output must have "
                "one row for each input row to be served in batches."
            )


def first_line(error: Exception) -> str:
    """The first line of an engine's message, which often runs on for pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
