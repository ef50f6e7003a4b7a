"""What merging sibling convolutions gains, and where it does not: GoogLeNet's 1x1 reductions.

    python -m benchmarks siblings                 each Inception module and the whole network
    python -m benchmarks siblings --help          sizes, batches, backend

Both programs are fused; one has the convolutions that read one input merged. Multiply-accumulates
are the same in both. Every pair is run in turn, and the merged one is measured against itself as a
control; a gain is claimed only where the control agrees with itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.engine import with_seen_data
from service.bench import BenchPlan, Subject, compare
from service.fusion import fuse
from service.graph import Program
from service.networks import make_network
from service.serving import LoadOptions, available_cpus, backend_named
from service.serving.backends.torch_cpu import cpu_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    module = with_seen_data(make_network(options.network)).eval()
    fusion = fuse(module, (torch.zeros(1, 3, options.size, options.size),))
    print(
        f"{options.network}, {options.size}x{options.size}, {options.backend}, {cpu_name()}, "
        f"{options.threads} threads, torch {torch.__version__}\n"
    )
    print(
        "| merged convolutions | batch | apart, ms | merged, ms | gain (95 % interval) | control |"
        "\n|---|--:|--:|--:|--:|--:|"
    )
    for merge in fusion.merges:
        part = (
            program.extract([merge.source], merge.outputs)
            for program in (fusion.separate, fusion.program)
        )
        _measure(", ".join(merge.modules), *part, options)
    _measure("the whole network", fusion.separate, fusion.program, options)
    for group in fusion.report.apart:
        print(f"\nnot merged: {', '.join(group.modules)}: {group.reason}")
    return 0


def _measure(name: str, apart: Program, merged: Program, options: argparse.Namespace) -> None:
    subjects = (
        _subject("apart", apart, options),
        _subject("merged", merged, options),
    )
    plan = BenchPlan(batch_sizes=tuple(options.batches), budget_seconds=options.seconds)
    shape = apart.inputs[0].shape[1:]
    result = compare(*subjects, _batches([n or 1 for n in shape]), plan)
    for batch in result.batches:
        interval = batch.ratio_interval
        print(
            f"| {name} | {batch.batch_size} | {batch.baseline.p50 * 1e3:.2f} | "
            f"{batch.candidate.p50 * 1e3:.2f} | "
            f"{batch.ratio:.3f} ({interval.low:.3f}-{interval.high:.3f}) | "
            f"{batch.control_ratio:.3f} |",
            flush=True,
        )


def _subject(name: str, program: Program, options: argparse.Namespace) -> Subject:
    place = LoadOptions(device="cpu").place
    prepared = backend_named(options.backend).prepare(program, place, "float32", options.batches)
    for _ in prepared.warm():
        pass
    return Subject(name, prepared.run, prepared.describe().to_dict())


def _batches(shape: Sequence[int]) -> Callable[[int], tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return lambda batch: (torch.randn(batch, *shape, generator=generator),)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="GoogLeNet")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument(
        "--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8]
    )
    parser.add_argument("--backend", default="torch", help="torch or openvino")
    parser.add_argument("--seconds", type=float, default=10.0, help="budget of one pair")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
