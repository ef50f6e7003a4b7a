"""Readiness for int8: how wide the values are that a quantiser would have to hold.

Fusing can widen a kernel: an identity branch behind a batch norm with a small variance adds a spike
to every centre tap, and per-tensor quantisation of the sum then loses the rest (Chu et al. 2022,
QARepVGG, §3: RepVGG falls from 72 % to 52 % top-1). What counts is the signal-to-noise ratio that a
symmetric 8-bit grid leaves, before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from service.fusion.certificate import make_probe
from service.fusion.cost import node_macs
from service.fusion.engine import Fusion
from service.fusion.jsonable import jsonable
from service.fusion.rules import CONVOLUTIONS
from service.graph.module import run
from service.graph.program import Node, Program, Ref

LEVELS = 127
"""Positive levels of a symmetric 8-bit grid."""

WIDENED_DB = 6.0
"""Loss of signal-to-noise ratio from which a layer is warned about, in decibels (6 is one bit)."""


@dataclass(frozen=True)
class KernelRange:
    """A kernel as a quantiser sees it.

    `spread` is the widest output channel's largest entry over the median channel's;
    `sqnr_tensor` and `sqnr_channel` are signal to quantisation noise in decibels with one scale for
    the kernel, and one a channel.
    """

    largest: float
    deviation: float
    spread: float
    sqnr_tensor: float
    sqnr_channel: float


@dataclass(frozen=True)
class LayerRange:
    """One fused layer: its main branch's kernel before, its kernel after, its output on a probe.

    Activations are `[smallest, largest]` and the largest over the 99.9th percentile of magnitudes.
    """

    module: str
    before: KernelRange | None
    after: KernelRange
    activation: tuple[float, float]
    activation_spread: float
    warning: str | None


def quantisation_report(fusion: Fusion, seed: int = 2021) -> tuple[LayerRange, ...]:
    """Ranges of every layer with a stored kernel, with a warning where fusing widened it.

    Siblings that were merged are told one by one.
    """
    program = fusion.separate
    regions = {region.weight: region for region in fusion.regions}
    nodes = {node.name: node for node in fusion.source.nodes}
    layers = []
    found = [(node, weight) for node in program.nodes if (weight := _stored_kernel(node, program))]
    outputs = _outputs(program, [node.name for node, _ in found], seed)
    for node, weight in found:
        region = regions.get(weight)
        members = [nodes[name] for name in sorted(region.form.nodes)] if region else []
        before, after = _main_branch(fusion, members), kernel_range(program.weights[weight])
        low, high, spread = outputs[node.name]
        layers.append(
            LayerRange(node.source, before, after, (low, high), spread, _warning(before, after))
        )
    return tuple(layers)


def _stored_kernel(node: Node, program: Program) -> str | None:
    """The name of the weight that a convolution, linear layer or per-channel scale uses."""
    weight = node.args.get("weight")
    used = node.op in CONVOLUTIONS or node.op in {"aten.linear", "aten.batch_norm"}
    stored = used and isinstance(weight, Ref) and weight.name in program.weights
    return weight.name if stored and isinstance(weight, Ref) else None


def kernel_range(kernel: Tensor) -> KernelRange:
    """Statistics of a kernel `[O, …]`."""
    rows = kernel.double().reshape(kernel.shape[0], -1)
    per_channel = rows.abs().amax(dim=1)
    largest = float(per_channel.max())
    median = float(per_channel.median())
    return KernelRange(
        largest=largest,
        deviation=float(rows.std(correction=0)),
        spread=largest / median if median > 0 else math.inf,
        sqnr_tensor=sqnr(rows, rows.abs().amax().reshape(1, 1)),
        sqnr_channel=sqnr(rows, per_channel.reshape(-1, 1)),
    )


def sqnr(values: Tensor, largest: Tensor) -> float:
    """Signal to noise, in decibels, of rounding to a symmetric 8-bit grid up to `largest`."""
    step = (largest / LEVELS).clamp_min(torch.finfo(torch.float64).tiny)
    noise = float((values - (values / step).round() * step).square().sum())
    signal = float(values.square().sum())
    if noise == 0.0 or signal == 0.0:
        return 200.0
    return 10 * math.log10(signal / noise)


def _outputs(
    program: Program, names: Sequence[str], seed: int
) -> dict[str, tuple[float, float, float]]:
    """Smallest, largest and spread of values of the program on one random probe."""
    if not names:
        return {}
    inputs = [
        probe.float() if probe.is_floating_point() else probe
        for probe in (
            make_probe(spec, 2, seed + index) for index, spec in enumerate(program.inputs)
        )
    ]
    observed = run(replace(program, outputs=tuple(names)), *inputs)
    result = {}
    for name, value in zip(names, observed, strict=True):
        magnitudes = value.abs().flatten()
        kept = max(1, math.ceil(magnitudes.numel() * 0.999))
        typical = float(magnitudes.kthvalue(kept).values)
        largest = float(magnitudes.max())
        spread = largest / typical if typical > 0 else math.inf
        result[name] = (float(value.min()), float(value.max()), spread)
    return result


def _main_branch(fusion: Fusion, members: Iterable[Node]) -> KernelRange | None:
    """The kernel of the branch with the most arithmetic, as it was trained."""
    specs, constants = fusion.analysis.specs, fusion.analysis.constants
    convolutions = [node for node in members if node.op in CONVOLUTIONS]
    if not convolutions:
        return None
    weight = max(convolutions, key=lambda node: node_macs(node, specs)).args["weight"]
    if not isinstance(weight, Ref) or weight.name not in constants:
        return None
    return kernel_range(constants[weight.name])


def _warning(before: KernelRange | None, after: KernelRange) -> str | None:
    if before is None or before.sqnr_tensor - after.sqnr_tensor < WIDENED_DB:
        return None
    lost = before.sqnr_tensor - after.sqnr_tensor
    remedy = (
        "quantise a channel at a time"
        if after.sqnr_channel - after.sqnr_tensor >= lost / 2
        else "expect a loss of accuracy in int8 even with one scale a channel"
    )
    return (
        f"fusing widened the kernel: 8 bits leave {after.sqnr_tensor:.1f} dB with one scale, "
        f"{lost:.1f} dB less than the main branch; {remedy}"
    )


def ranges_to_dict(layers: Iterable[LayerRange]) -> list[dict[str, Any]]:
    """JSON-able; a number that is not finite becomes null."""
    return [jsonable(layer) for layer in layers]
