"""From the training form in eager PyTorch to what is served: what each step is worth.

    python -m benchmarks shares                 on the machine as it is
    python -m benchmarks shares --contended     while as many other processes want every core

Each way differs from the one before in one thing: fusing, the engine, the use of threads, the
precision. Their speed-ups multiply to the whole. All run in turns, the first twice as a control.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import promises
from benchmarks.arms import RESULTS, Arm, Measured, contention, heading, measure, save, table
from benchmarks.engine import eager, images, network, numbers, prepared
from service.fusion import fuse
from service.graph import Program, ProgramModule, trace
from service.networks import known_names
from service.serving import available_cpus
from service.serving.backends.choices import Choice, Choices
from service.serving.backends.openvino_backend import OpenVinoBackend
from service.serving.backends.quantise import is_installed as can_quantise

SERVED = {
    "float32": "deploy form, openvino, a stream a core",
    "bfloat16": "the same in bfloat16",
    "int8": "the same in int8",
}
STEPS = ("fusing", "engine", "threads", "precision bfloat16", "precision int8")


class Fixed(Choices):
    """Answers every question with one way, so that an arm is what its name says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self._way = way

    def get(self, key: str) -> Choice | None:
        return Choice(self._way, {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    module = network(options.network, options.seed).eval()
    deploy = fuse(trace(module, (torch.zeros(1, 3, options.size, options.size),))).program
    first = Arm("training form, eager module", eager(module))
    arms = [first, *_ways(deploy, options)]
    others = available_cpus() if options.contended else 0
    rows: list[Measured] = []
    with contention(others, 2 * options.seconds + 240):
        for group in measure(arms, images(options.size), options.batches, options.seconds):
            rows += group
    kept = promises.lines(list(_promises(rows, options.batches, options.contended)))
    lines = [*table(rows), "", *_shares(rows, options.batches), *kept]
    where = f"beside {others} busy processes" if others else "on the machine as it is"
    data = {
        "network": options.network,
        "input": [3, options.size, options.size],
        "busy_processes": others,
        "environment": heading(options.threads),
        "ways": {arm.name: dict(arm.about) for arm in arms},
        "measured": [row.to_dict() for row in rows],
    }
    stem = "shares-contended" if others else "shares"
    save(
        stem,
        f"Shares: {options.network}, {options.size}x{options.size}, {where}",
        data,
        lines,
        options.out,
    )
    return 0


def _ways(deploy: Program, options: argparse.Namespace) -> Iterator[Arm]:
    yield Arm("deploy form, eager", eager(ProgramModule(deploy)))
    sizes = sorted({1, *options.batches})
    apart = "apart" if options.threads > 1 else "alone"
    together, streams = OpenVinoBackend(Fixed("together")), OpenVinoBackend(Fixed(apart))
    yield prepared("deploy form, openvino, threads together", together, deploy, "float32", sizes)
    yield prepared(SERVED["float32"], streams, deploy, "float32", sizes)
    yield prepared(SERVED["bfloat16"], streams, deploy, "bfloat16", sizes)
    if can_quantise():
        yield prepared(SERVED["int8"], streams, deploy, "int8", sizes)


def _shares(rows: Sequence[Measured], batches: Sequence[int]) -> Iterator[str]:
    """What each step multiplies the speed by; both precisions start from float32 streams."""
    yield "| batch | step | times | in all |"
    yield "|---:|---|---:|---:|"
    for size in batches:
        speedups = [row.speedup for row in rows if row.batch == size][:-1]
        before = [*speedups[:4], speedups[3]]
        for step, ratio, so_far in zip(STEPS, speedups[1:], before, strict=False):
            yield f"| {size} | {step} | {ratio / so_far:.2f} | {ratio:.2f} |"


def _promises(
    rows: Sequence[Measured], batches: Sequence[int], contended: bool
) -> Iterator[promises.Promise]:
    for size in batches:
        found = {row.arm: row for row in rows if row.batch == size}
        speedups = {
            precision: (row.interval.low, row.speedup, row.interval.high)
            for precision, arm in SERVED.items()
            if (row := found.get(arm)) is not None
        }
        yield from promises.of_shares(speedups, size, contended)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contended", action="store_true", help="start other busy processes")
    parser.add_argument("--network", default="RepVGG-A0", choices=known_names(), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batches", type=numbers, default=[8, 32], help="such as 8,32")
    parser.add_argument("--seconds", type=float, default=120.0, help="budget of all batch sizes")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
