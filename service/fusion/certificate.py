"""The certificate: what was checked about a conversion, the numbers, and whether they suffice.

Two checks. Every fused region is compared with the operators it replaced, in float64, on random
probes that fill the whole map, borders included: this finds a wrong kernel wherever it is. And the
whole network is compared end to end, in float64 and in the precision that will be served, relative
to how much its output varies between probes: an output that hardly varies proves nothing, however
small the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.fusion.constants import Constants
from service.fusion.engine import Fusion
from service.fusion.jsonable import jsonable
from service.fusion.siblings import merge_siblings
from service.graph.module import run
from service.graph.operators import DTYPES
from service.graph.program import Program, TensorSpec


@dataclass(frozen=True)
class CertificateLimits:
    """What is demanded. Errors are ratios without a unit.

    `region_error`: largest deviation of a region's output over its root mean square, in float64.
    `end_to_end_float64`, `end_to_end`: root mean square of the difference over the variation of the
    output between probes, in float64 and in the served precision.
    """

    region_error: float = 1e-12
    end_to_end_float64: float = 1e-9
    end_to_end: float = 1e-3


@dataclass(frozen=True)
class RegionCheck:
    """A fused or merged region and its `error`, which `CertificateLimits.region_error` bounds."""

    module: str
    error: float


@dataclass(frozen=True)
class Certificate:
    """The proof that a fused program equals its source, and the numbers behind it.

    `output_variation` is the variation between probes over the output's root mean square;
    `top1_agreement` the share of probes whose largest output stays the largest (None where outputs
    are not class scores); `failures` are sentences, empty when `passed`.
    """

    passed: bool
    failures: tuple[str, ...]
    error_float64: float
    error_end_to_end_float64: float
    error_end_to_end: float
    output_variation: float
    top1_agreement: float | None
    precision: str
    probes: int
    seed: int
    seconds: float
    limits: CertificateLimits
    regions: tuple[RegionCheck, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return jsonable(self)


def certify(
    fusion: Fusion,
    *,
    served: Program | None = None,
    precision: str = "float32",
    probes: int = 4,
    seed: int = 2021,
    limits: CertificateLimits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Check `fusion` against its source.

    `served` is the program that will be served, by default `fusion.program`; `precision` the dtype
    it computes in. `progress` is told how many regions of how many are checked.
    """
    started = time.perf_counter()
    limits = limits or CertificateLimits()
    unmerged = fusion.rewritten_in("float64")
    exact = merge_siblings(unmerged).program
    checks = check_regions(fusion, unmerged, seed, progress)
    checks += check_merges(fusion, unmerged, exact, seed)
    ends = check_ends(
        fusion.source, exact, (served or fusion.program).to(precision), precision, probes, seed
    )
    error_float64 = max((check.error for check in checks), default=0.0)
    failures = [
        f"Region {check.module or check} deviates by {check.error:.2e} of its root mean square; "
        f"at most {limits.region_error:.0e} is allowed."
        for check in checks
        if not check.error <= limits.region_error
    ]
    failures += _end_failures(ends, limits, precision)
    return Certificate(
        passed=not failures,
        failures=tuple(failures),
        error_float64=error_float64,
        error_end_to_end_float64=ends.float64,
        error_end_to_end=ends.served,
        output_variation=ends.variation,
        top1_agreement=ends.top1,
        precision=precision,
        probes=probes,
        seed=seed,
        seconds=time.perf_counter() - started,
        limits=limits,
        regions=tuple(checks),
    )


def check_regions(
    fusion: Fusion,
    exact: Program,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[RegionCheck]:
    """Compare every fused region of `exact` (float64) with the operators that it replaced."""
    source = fusion.source.to("float64")
    specs = source.specs()
    checks = []
    for index, region in enumerate(fusion.regions):
        old = source.extract([region.root], [region.output])
        new_root = fusion.renamed.get(region.root, region.root)
        new = exact.extract([new_root], [region.output])
        probe = make_probe(specs[region.root], 1, seed + index)
        checks.append(RegionCheck(region.module, _deviation(run(old, probe), run(new, probe))))
        if progress is not None:
            progress(index + 1, len(fusion.regions))
    return checks


def check_merges(fusion: Fusion, unmerged: Program, exact: Program, seed: int) -> list[RegionCheck]:
    """Compare every merged group of sibling convolutions with the separate ones, in float64."""
    specs = unmerged.specs()
    checks = []
    for index, merge in enumerate(fusion.merges):
        probe = make_probe(specs[merge.source], 1, seed + index)
        old = run(unmerged.extract([merge.source], merge.outputs), probe)
        new = run(exact.extract([merge.source], merge.outputs), probe)
        error = max(_deviation([a], [b]) for a, b in zip(old, new, strict=True))
        checks.append(RegionCheck(" + ".join(merge.modules), error))
    return checks


@dataclass(frozen=True)
class EndToEnd:
    """Whole-network differences; see `CertificateLimits` and `Certificate` for the ratios."""

    float64: float
    served: float
    variation: float
    top1: float | None
    finite: bool


def check_ends(
    source: Program, exact: Program, served: Program, precision: str, probes: int, seed: int
) -> EndToEnd:
    """Run source (float64), fused (float64) and fused (served precision) on the same probes."""
    inputs = make_probes(source, probes, seed)
    truth = run(source.to("float64"), *inputs)
    fused = run(exact, *inputs)
    dtype = DTYPES[precision]
    low = run(served, *[x.to(dtype) if x.is_floating_point() else x for x in inputs])
    real = [index for index, output in enumerate(truth) if output.is_floating_point()]
    constants = Constants(source)
    variations = [
        # An output that no input reaches, such as a table of anchors, cannot vary.
        _rms(truth[i]) if source.outputs[i] in constants else _variation(truth[i])
        for i in real
    ]
    return EndToEnd(
        float64=max(
            (_ratio(fused[i] - truth[i], v) for i, v in zip(real, variations, strict=True)),
            default=0.0,
        ),
        served=max(
            (_ratio(low[i].double() - truth[i], v) for i, v in zip(real, variations, strict=True)),
            default=0.0,
        ),
        variation=min(
            (v / max(_rms(truth[i]), 1e-300) for i, v in zip(real, variations, strict=True)),
            default=0.0,
        ),
        top1=_top1(truth, low),
        finite=all(bool(output.isfinite().all()) for output in (*truth, *fused, *low)),
    )


def make_probes(program: Program, rows: int, seed: int) -> list[Tensor]:
    """Random float64 inputs of a whole program, `rows` of each, as the certificate uses them."""
    return [
        make_probe(spec, rows, seed + 7919 * (index + 1))
        for index, spec in enumerate(program.inputs)
    ]


def end_to_end_error(truth: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest root mean square difference of the floating-point outputs over their variation.

    `truth` is in float64; infinite when an output is missing, not finite or of another shape.
    """
    if [output.shape for output in truth] != [output.shape for output in found]:
        return float("inf")
    pairs = [(a, b.double()) for a, b in zip(truth, found, strict=True) if a.is_floating_point()]
    if not all(bool(b.isfinite().all()) for _, b in pairs):
        return float("inf")
    return max((_ratio(b - a, _variation(a)) for a, b in pairs), default=0.0)


def make_probe(spec: TensorSpec, rows: int, seed: int) -> Tensor:
    """A random float64 input `[rows, …]`, dense up to the borders; rows differ in scale.

    The mean is not zero, so that a lost bias or padding shows; integer inputs count from zero.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = spec.sized(rows)
    if not DTYPES[spec.dtype].is_floating_point:
        return torch.randint(0, 2, shape, generator=generator).to(DTYPES[spec.dtype])
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 1.5, max(shape[0], 1), dtype=torch.float64)
    return (noise + 0.3) * scale.reshape(-1, *[1] * (len(shape) - 1))


def _deviation(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    """Largest absolute difference over the old output's root mean square; inf if not finite."""
    difference = float((old[0] - new[0]).abs().amax())
    ratio = difference / max(_rms(old[0]), 1e-300)
    return ratio if ratio == ratio else float("inf")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _variation(output: Tensor) -> float:
    """Root mean square of an output's deviation from its mean over the probes."""
    return _rms(output - output.mean(dim=0, keepdim=True)) if output.dim() else 0.0


def _ratio(difference: Tensor, variation: float) -> float:
    error = _rms(difference)
    return 0.0 if error == 0.0 else error / variation if variation > 0.0 else float("inf")


def _top1(truth: Sequence[Tensor], served: Sequence[Tensor]) -> float | None:
    """Share of rows with the same largest class; a lead below the rounding error is no lead."""
    scores = truth[0]
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        return None
    other = served[0].double()
    chosen = other.argmax(dim=1, keepdim=True)
    lead = scores.amax(dim=1) - scores.gather(1, chosen).squeeze(1)
    slack = 2 * (other - scores).abs().amax(dim=1)
    relative = slack <= 1e-3 * _variation(scores)
    same = (lead == 0) | ((lead <= slack) & relative)
    return float(same.double().mean())


def _end_failures(ends: EndToEnd, limits: CertificateLimits, precision: str) -> list[str]:
    failures = []
    if not ends.finite:
        failures.append("The network's output is not finite on the probes.")
    if not ends.float64 <= limits.end_to_end_float64:
        failures.append(
            f"End to end in float64 the outputs differ by {ends.float64:.2e} of their variation; "
            f"at most {limits.end_to_end_float64:.0e} is allowed."
        )
    if not ends.served <= limits.end_to_end:
        failures.append(
            f"End to end in {precision} the outputs differ by {ends.served:.2e} of their variation "
            f"between inputs, which is {ends.variation:.1e} of their size; at most "
            f"{limits.end_to_end:.0e} is allowed."
        )
    if ends.top1 is not None and ends.top1 < 1.0 and precision in {"float32", "float64"}:
        failures.append(f"The top-1 class changed on {1 - ends.top1:.0%} of the probes.")
    return failures
