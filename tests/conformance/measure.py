"""One conformance case through the engine: what it gives beside what the official code gives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.fusion import fuse
from service.fusion.cost import convolution_count, program_macs
from service.graph import Program, run, trace
from service.networks import Recognition, deploy_skeleton
from service.partial import deploy_tensors
from tests.conformance import official
from tests.networks import cases

FLOAT64 = 1e-10
"""Largest relative end-to-end error in float64."""
FLOAT32_TIMES = 10
"""Largest end-to-end error in float32, in times the case's own float32 noise."""
TENSOR = 1e-6
"""Largest relative difference of a float32 deploy tensor's checksums from the official ones."""
WITHOUT_DEPLOY_FORM = {
    "blk_acb_affine_false": "the official conversion raises",
    "blk_yolov6_linearadd": "there is no official conversion",
}
"""Cases whose official code gives no deploy form, and why: their outputs alone are compared."""


@dataclass(frozen=True)
class Counts:
    """Convolutions run, and multiply-accumulates of one sample."""

    convolutions: int
    macs: int

    @staticmethod
    def of(program: Program) -> Counts:
        return Counts(convolution_count(program), program_macs(program))


@dataclass(frozen=True)
class Row:
    """What one case gave.

    `official` counts the official deploy form. Errors are relative to the official training form in
    float64, `noise` is that form's own float32 error, and `tensors` the worst checksum of a deploy
    tensor (None without an official deploy form). `seconds` is what fusing took.
    """

    case: str
    before: Counts
    after: Counts
    official: Counts | None
    float64: float
    float32: float
    noise: float
    tensors: float | None
    seconds: float

    def failures(self) -> Iterator[str]:
        """Sentences about what this case does not keep; nothing where it passes."""
        if not self.float64 <= FLOAT64:
            yield f"float64 error {self.float64:.1e}"
        if not self.float32 <= FLOAT32_TIMES * self.noise:
            yield f"float32 error {self.float32:.1e}, noise {self.noise:.1e}"
        if self.tensors is None and self.case not in WITHOUT_DEPLOY_FORM:
            yield "no deploy tensors were compared"
        if self.tensors is not None and not self.tensors <= TENSOR:
            yield f"deploy tensors differ by {self.tensors:.1e}"
        if self.official is not None:
            if self.after.convolutions > self.official.convolutions:
                yield f"{self.after.convolutions} convolutions, {self.official.convolutions} there"
            if self.after.macs > self.official.macs:
                yield f"{self.after.macs} MACs, {self.official.macs} officially"


def measure(name: str) -> Row:
    """Build, fuse and run the case `name`, in float64 and float32."""
    recognition, module = cases.built(name, **cases.said(name))
    x = cases.input_of(name)
    truth = cases.outputs(module, x.double())
    program = trace(module.float(), (x,))
    started = time.perf_counter()
    fusion = fuse(program)
    seconds = time.perf_counter() - started
    exact = _flat(run(fusion.program_in("float64"), x.double()))
    served = _flat(run(fusion.program, x))
    wanted = cases.load(name)
    tensors = deploy = None
    if wanted.get("deploy_state"):
        found = deploy_tensors(module, fusion, recognition.public_key)
        tensors = official.deploy_error(name, found)
        deploy = Counts.of(official_program(recognition, module, x))
    return Row(
        case=name,
        before=Counts.of(program),
        after=Counts.of(fusion.program),
        official=deploy,
        float64=max(cases.output_error(name, exact), float((exact - truth).norm() / truth.norm())),
        float32=float((served.double() - truth).norm() / truth.norm()),
        noise=wanted["f32_vs_f64_rel"],
        tensors=tensors,
        seconds=seconds,
    )


def official_program(recognition: Recognition, module: nn.Module, x: Tensor) -> Program:
    """The graph of the official deploy form: its layers under its keys, in the network's wiring.

    That its keys and shapes are the official ones is what comparing the deploy tensors shows.
    """
    return trace(deploy_skeleton(module).eval(), (x,))


def _flat(outputs: Iterable[Tensor]) -> Tensor:
    return torch.cat([output.flatten(1) for output in outputs], 1)


def table(rows: Iterable[Row]) -> Iterator[str]:
    """The rows as a Markdown table."""
    yield (
        "| case | convolutions | multiply-accumulates | float64 error | float32 error | noise | "
        "tensors | seconds |"
    )
    yield "|---|---|---|--:|--:|--:|--:|--:|"
    for row in rows:
        convolutions = [str(row.before.convolutions), "-", str(row.after.convolutions)]
        macs = [_count(row.before.macs), "-", _count(row.after.macs)]
        if row.official is not None:
            convolutions[1], macs[1] = str(row.official.convolutions), _count(row.official.macs)
        yield (
            f"| {row.case} | {' / '.join(convolutions)} | {' / '.join(macs)} | "
            f"{row.float64:.0e} | {row.float32:.0e} | {row.noise:.0e} | "
            f"{'-' if row.tensors is None else f'{row.tensors:.0e}'} | {row.seconds:.2f} |"
        )


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """How many cases pass, where we run less than the official deploy form, and what fails."""
    failing = {row.case: list(row.failures()) for row in rows}
    yield f"{sum(not found for found in failing.values())} of {len(rows)} cases pass."
    fewer = [
        row.case
        for row in rows
        if row.official is not None and row.after.convolutions < row.official.convolutions
    ]
    less = [
        row.case for row in rows if row.official is not None and row.after.macs < row.official.macs
    ]
    yield f"Fewer convolutions than the official deploy form: {', '.join(fewer) or 'none'}."
    yield f"Fewer multiply-accumulates: {', '.join(less) or 'none'}."
    for case, reason in WITHOUT_DEPLOY_FORM.items():
        if case in failing:
            yield f"{case} has no official deploy form: {reason}."
    for case, found in failing.items():
        if found:
            yield f"{case} FAILS: {'; '.join(found)}."


def _count(number: int) -> str:
    """A count with three digits and a unit."""
    if number < 1000:
        return str(number)
    power = int(math.log10(number)) // 3
    return f"{number / 1000**power:.3g} {' kMG'[power]}"
