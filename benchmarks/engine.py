"""What fusing a network is worth, engine by engine, on this machine.

    python -m benchmarks.engine                      RepVGG-A0 at 224x224, batch 1, 8 and 32
    python -m benchmarks.engine --help               other networks, batches, precisions, devices

Builds a training-form network with seeded weights and varied batch-norm statistics, fuses it, and
compares pairs that each differ in one thing: the training form against the deploy form in every
engine (what fusion is worth), and the plain module as people serve it by mistake against each
engine's deploy form (what the service is worth). Every pair is interleaved, with the second of the
two measured against itself as a control; without a quiet enough machine there is no claim.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from service.bench import BatchComparison, BenchPlan, Comparison, Subject, compare
from service.fusion import certify, fuse
from service.graph import Program, trace
from service.networks import known_names, make_network
from service.serving import LoadOptions, Precision, available_cpus, backend_named, backend_names
from service.serving.backends.torch_cpu import cpu_name

HEADER = (
    f"{'batch':>5} {'rounds':>6}  {'baseline ms':>24}  {'candidate ms':>24}  "
    f"{'speed-up':>22}  {'control':>7}  {'saving':>7}  verdict"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    options = _parser().parse_args(arguments)
    options.place = LoadOptions(device=options.device).place
    torch.set_num_threads(options.threads)
    plan = BenchPlan(
        batch_sizes=tuple(options.batches), budget_seconds=options.seconds, seed=options.seed
    )
    module = network(options.network, options.seed).eval()
    size = options.size
    train = trace(module, (torch.zeros(1, 3, size, size),))
    fusion = fuse(train)
    certificate = certify(fusion)
    totals = fusion.report.to_dict()["totals"]
    print(f"{options.network}, {size}x{size}, {options.precision}, {options.threads} threads")
    print(f"certificate {'passed' if certificate.passed else 'FAILED'}; {json.dumps(totals)}")
    results = []
    for title, baseline, candidate in _pairs(module, train, fusion.program, options):
        result = compare(baseline, candidate, _input(size), plan)
        results.append(result)
        print("\n".join(table(title, result)), flush=True)
    print(f"\n{cpu_name()}; {json.dumps(dict(results[0].environment))}; {results[0].started}")
    if options.json:
        data: dict[str, Any] = {
            "network": options.network,
            "input": [3, size, size],
            "totals": totals,
            "certificate": certificate.to_dict(),
            "comparisons": [result.to_dict() for result in results],
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


def network(name: str, seed: int) -> nn.Module:
    """A published network with seeded weights and batch norms that have seen different data."""
    torch.manual_seed(seed)
    return with_seen_data(make_network(name))


def with_seen_data(module: nn.Module) -> nn.Module:
    """`module` with random affine parameters and statistics in its batch norms."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean = torch.randn(norm.num_features) * 0.2
            norm.running_var = torch.rand(norm.num_features) + 0.5
    return module


def table(title: str, result: Comparison) -> Iterator[str]:
    """The comparison as lines of text: medians with quartiles, ratio with interval, control."""
    yield f"\n{title}: {result.baseline} -> {result.candidate}"
    for name, about in result.descriptions.items():
        chosen = {key: about[key] for key in ("backend", "layout", "threads") if key in about}
        yield f"  {name}: {chosen} {' '.join(about.get('notes', ()))}"
    yield HEADER
    yield from (_row(batch) for batch in result.batches)


def _row(batch: BatchComparison) -> str:
    def latency(q: Any) -> str:
        return f"{q.p50 * 1e3:8.2f} ({q.p25 * 1e3:.2f}-{q.p75 * 1e3:.2f})"

    interval = f"{batch.ratio_interval.low:.2f}-{batch.ratio_interval.high:.2f}"
    saving = "" if batch.saving_percent is None else f"{batch.saving_percent:.1f} %"
    return (
        f"{batch.batch_size:>5} {batch.rounds:>6}  {latency(batch.baseline):>24}  "
        f"{latency(batch.candidate):>24}  {f'{batch.ratio:.2f} ({interval})':>22}  "
        f"{batch.control_ratio:>7.3f}  {saving:>7}  {batch.verdict}"
    )


def _pairs(
    module: nn.Module, train: Program, deploy: Program, options: argparse.Namespace
) -> Iterator[tuple[str, Subject, Subject]]:
    plain = Subject("training module, eager", _eager(module), {"backend": "torch module"})
    for backend in options.backends:
        before = _prepared("training form", train, backend, "float32", options)
        after = _prepared("deploy form", deploy, backend, "float32", options)
        yield f"fusion in {backend}, float32", before, after
        served = after
        if options.precision != "float32":
            served = _prepared("deploy form", deploy, backend, options.precision, options)
            yield f"precision in {backend}", replace(after, name="deploy form, float32"), served
        if options.place == "cpu":
            yield f"everything, {backend} {options.precision}", plain, served


def _prepared(
    name: str, program: Program, backend: str, precision: Precision, options: argparse.Namespace
) -> Subject:
    prepared = backend_named(backend).prepare(program, options.place, precision, options.batches)
    for _ in prepared.warm():
        pass
    full = f"{name}, {backend} {precision}"
    return Subject(full, prepared.run, prepared.describe().to_dict())


def _eager(module: nn.Module) -> Callable[[tuple[Tensor, ...]], object]:
    def run(batch: tuple[Tensor, ...]) -> object:
        with torch.inference_mode():
            return module(*batch)

    return run


def _input(size: int) -> Callable[[int], tuple[Tensor, ...]]:
    random = torch.Generator().manual_seed(0)
    return lambda batch: (torch.randn(batch, 3, size, size, generator=random),)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="RepVGG-A0", choices=known_names(), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32], help="such as 1,8,32")
    parser.add_argument("--seconds", type=float, default=40.0, help="budget of one pair")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--backends", type=lambda t: t.split(","), default=list(backend_names()))
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
