"""The fastest backend that agrees: candidates are checked against PyTorch, then measured here."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from service.errors import BackendFailed
from service.graph import Program
from service.serving.backends.base import Backend, Description, Precision, Prepared
from service.serving.backends.choose import fastest
from service.serving.backends.rows import checked_sizes, random_rows

log = logging.getLogger(__name__)

PROBE_ROWS = 8
TOLERANCES: Mapping[Precision, float] = {
    "float32": 1e-4,
    "tf32": 1e-2,
    "bfloat16": 5e-2,
    "float16": 1e-2,
}
"""Largest difference from PyTorch's float32 outputs, in 2-norm, relative to how much those outputs
vary between probe rows (an output that hardly varies must not hide an error)."""


class AutoBackend:
    """Tries every candidate on a CPU and keeps the fastest that agrees; elsewhere the first.

    The first candidate is the default: it needs no agreement, because it computes what was asked
    for by definition, and others must beat it by a margin. A program with the same structure is not
    measured again in this process.
    """

    name = "auto"

    def __init__(self, candidates: Sequence[Backend]) -> None:
        self._candidates = tuple(candidates)
        self._choices: dict[str, str] = {}

    def prepare(
        self, program: Program, device: str, precision: Precision, batch_sizes: Sequence[int]
    ) -> Prepared:
        """Load `program` with every candidate; `warm` chooses.

        Raises BackendFailed when the first candidate cannot run the program so; the others are
        then merely left out, and a note says why.
        """
        default, *others = self._candidates
        first = default.prepare(program, device, precision, batch_sizes)
        if device != "cpu" or not others:
            return first
        prepared = {default.name: first}
        notes = []
        for other in others:
            try:
                prepared[other.name] = other.prepare(program, device, precision, batch_sizes)
            except BackendFailed as error:
                notes.append(f"{other.name} was left out: {error.detail}")
        exact = precision == "float32"
        reference = first if exact else default.prepare(program, device, "float32", batch_sizes)
        key = f"{structure(program)} {device} {precision} {sorted(prepared)} {max(batch_sizes)}"
        return _Auto(precision, batch_sizes, prepared, reference, notes, self._choices, key)


class _Auto:
    def __init__(
        self,
        precision: Precision,
        batch_sizes: Sequence[int],
        candidates: dict[str, Prepared],
        reference: Prepared,
        notes: Sequence[str],
        choices: dict[str, str],
        key: str,
    ) -> None:
        self.batch_sizes = checked_sizes(batch_sizes)
        self._tolerance = TOLERANCES[precision]
        self._candidates = candidates
        self._reference = reference
        self._notes = tuple(notes)
        self._choices, self._key = choices, key
        self._chosen = next(iter(candidates.values()))
        self.inputs, self.outputs = self._chosen.inputs, self._chosen.outputs

    def warm(self) -> Iterator[None]:
        """Warm every candidate, drop those that disagree, measure the rest, keep one."""
        default, *others = self._candidates
        yield from self._candidates[default].warm()
        for name in others:
            try:
                yield from self._candidates[name].warm()
                self._check(name)
            except Exception as error:
                log.warning("the backend %s was left out: %s", name, error)
                self._notes += (f"{name} was left out: {error}",)
                self._candidates.pop(name).close()
            yield
        key = f"{self._key} {torch.get_num_threads()}"
        if (known := self._choices.get(key)) not in self._candidates:
            known = self._choices[key] = yield from self._measure()
        for name in self._candidates.keys() - {known}:
            self._candidates.pop(name).close()
        self._chosen = self._candidates[known]
        if self._reference is not self._chosen:
            self._reference.close()

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        return self._chosen.run(batch)

    def describe(self) -> Description:
        chosen = self._chosen.describe()
        return replace(chosen, notes=(*chosen.notes, *self._notes))

    def close(self) -> None:
        for prepared in (self._reference, *self._candidates.values()):
            prepared.close()

    def _check(self, name: str) -> None:
        """Raises BackendFailed when a candidate's outputs are not those of the reference."""
        batch = random_rows(self.inputs, min(PROBE_ROWS, self.batch_sizes[-1]), seed=1)
        expected, got = self._reference.run(batch), self._candidates[name].run(batch)
        for truth, answer in zip(expected, got, strict=True):
            difference = relative_difference(truth, answer)
            if not difference <= self._tolerance:  # so that NaN is refused too
                raise BackendFailed(
                    f"its outputs differ from PyTorch's by {difference:.1e} of their variation, "
                    f"more than {self._tolerance:.0e}"
                )

    def _measure(self) -> Generator[None, None, str]:
        sizes = sorted({1, min(PROBE_ROWS, self.batch_sizes[-1])})
        runs = {name: candidate.run for name, candidate in self._candidates.items()}
        batches = [random_rows(self.inputs, size) for size in sizes]
        name, relative = yield from fastest(runs, batches)
        default, *others = runs
        self._notes += tuple(f"{other} took {relative[other]:.2f} of {default}" for other in others)
        return name


def relative_difference(truth: Tensor, answer: Tensor) -> float:
    """2-norm of the difference over that of `truth` [N, ...] around its mean row.

    With one row, or an output that does not vary at all, over that of `truth` itself; integer
    outputs (labels) must be equal.
    """
    if not truth.is_floating_point():
        return 0.0 if torch.equal(truth, answer) else float("inf")
    exact = truth.double()
    error = (answer.double() - exact).norm()
    variation = (exact - exact.mean(0)).norm()
    scale = variation if len(exact) > 1 and variation > 0 else exact.norm()
    return float(error / scale) if error else 0.0


def structure(program: Program) -> str:
    """A digest of everything about a program that its speed depends on: all but the weights."""
    digest = hashlib.sha256(repr(program.inputs).encode())
    for node in program.nodes:
        digest.update(repr((node.op, dict(node.args), node.shape, node.dtype)).encode())
    for name, tensor in program.weights.items():
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
    return digest.hexdigest()
