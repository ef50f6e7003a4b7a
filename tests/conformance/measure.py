"""One conformance case through the engine: what it gives beside what the official code gives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from service.fusion import fuse
from service.graph import ProgramModule, run, trace
from service.networks import deploy_skeleton
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
    """Convolutions run, and multiply-accumulates of one sample in products of any kind."""

    convolutions: int
    macs: int


class Counter(TorchDispatchMode):
    """Counts what PyTorch runs inside it."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.convolutions, self.macs = batch, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.convolutions += 1
            self.macs += out.numel() * math.prod(args[1].shape[1:])
        elif name in {"mm", "bmm", "addmm"}:
            self.macs += out.numel() * args[1 if name == "addmm" else 0].shape[-1]
        return out

    def counts(self) -> Counts:
        return Counts(self.convolutions, self.macs // self.batch)


def count(function: Callable[[Tensor], object], x: Tensor) -> Counts:
    """What `function(x)` runs."""
    with torch.no_grad(), Counter(len(x)) as counter:
        function(x)
    return counter.counts()


@dataclass(frozen=True)
class Row:
    """What one case gave, and the network that it was recognised as.

    `official` counts the official deploy form. Errors are relative to the official training form in
    float64, `noise` is that form's own float32 error, and `tensors` the worst checksum of a deploy
    tensor (None without an official deploy form). `seconds` is what fusing took.
    """

    case: str
    network: str
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
    case = cases.load(name)
    tensors = deploy = None
    if case.get("deploy_state"):
        found = deploy_tensors(module, fusion, recognition.public_key)
        tensors = official.deploy_error(name, found)
        # Keys and shapes of the skeleton are the official ones, as the comparison just showed.
        deploy = count(deploy_skeleton(module).eval(), x)
    return Row(
        case=name,
        network=recognition.name,
        before=count(module, x),
        after=count(ProgramModule(fusion.program), x),
        official=deploy,
        float64=max(cases.output_error(name, exact), float((exact - truth).norm() / truth.norm())),
        float32=float((served.double() - truth).norm() / truth.norm()),
        noise=case["f32_vs_f64_rel"],
        tensors=tensors,
        seconds=seconds,
    )


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
