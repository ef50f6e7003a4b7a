"""Several ways to run one network, measured in turns against the first of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from service.bench import Interval, Quantiles, environment
from service.bench.measure import rounds
from service.bench.statistics import median_ratio, quantiles, ratio_interval
from service.serving.backends.machine import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 0.02
CONTROL = "the first again (control)"
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Arm:
    """One way: its name, what runs a batch to its end, and how."""

    name: str
    run: Callable[[Batch], object]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """One arm at one batch size; seconds per batch.

    `speedup` is the first arm's median over this one's. `claim` is False where the first arm
    measured twice differed from itself by more than 2 per cent: then the figure is an impression.
    """

    batch: int
    arm: str
    seconds: Quantiles
    speedup: float
    interval: Interval
    control: float
    claim: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "seconds": self.seconds.to_dict(),
            "interval": self.interval.to_dict(),
        }


def measure(
    arms: Sequence[Arm],
    make_batch: Callable[[int], Batch],
    batches: Sequence[int],
    seconds: float,
    seed: int = 0,
) -> Iterator[list[Measured]]:
    """For each batch size every arm's figures, the first and its control included.

    All arms take turns in random order, so a slow moment hits all alike. `seconds` is the budget of
    all batch sizes together; larger ones get more, and each has at least one whole round.
    """
    everyone = [*arms, Arm(CONTROL, arms[0].run, arms[0].about)]
    shuffle = random.Random(seed)
    weights = [size**0.5 for size in batches]
    for size, weight in zip(batches, weights, strict=True):
        rows = make_batch(size)
        steps = rounds(
            [_bound(arm, rows) for arm in everyone],
            budget_seconds=seconds * weight / sum(weights),
            warmup_seconds=0.2,
            sample_seconds=0.002,
            max_rounds=200,
            shuffle=shuffle,
        )
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                samples = stop.value.seconds
                break
        control = median_ratio(samples[0], samples[-1])
        claim = abs(control - 1) <= TOLERANCE and samples.shape[1] >= 5
        yield [
            Measured(
                size,
                arm.name,
                quantiles(own),
                median_ratio(samples[0], own),
                ratio_interval(samples[0], own),
                control,
                claim,
            )
            for arm, own in zip(everyone, samples, strict=True)
        ]


def _bound(arm: Arm, rows: Batch) -> Callable[[], object]:
    return lambda: arm.run(rows)


def table(rows: Sequence[Measured]) -> Iterator[str]:
    """Lines of a Markdown table: medians with quartiles in milliseconds, speed-up, interval."""
    yield "| batch | way | ms (quartiles) | rounds | speed-up (95 % interval) | claim |"
    yield "|---:|---|---:|---:|---:|---|"
    for row in rows:
        q = row.seconds
        yield (
            f"| {row.batch} | {row.arm} | {q.p50 * 1e3:.2f} ({q.p25 * 1e3:.2f}-{q.p75 * 1e3:.2f}) "
            f"| {q.count} | {row.speedup:.2f} ({row.interval.low:.2f}-{row.interval.high:.2f}) "
            f"| {'yes' if row.claim else f'no: control {row.control:.3f}'} |"
        )


def heading(threads: int) -> dict[str, Any]:
    """The machine, the libraries and the bounds under which everything is measured."""
    packages = ("openvino", "nncf")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except ModuleNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**environment(), "cpu": cpu_name(), "gpu": device, "threads": threads, **versions}


def save(stem: str, title: str, data: Mapping[str, Any], lines: Sequence[str], out: Path) -> None:
    """Print the lines; write them as `stem`.md and everything as `stem`.json into `out`."""
    text = "\n".join([f"# {title}", "", *lines, "", f"`{json.dumps(data['environment'])}`"])
    print(text, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.md").write_text(text + "\n")
    (out / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")


_BUSY = """
import sys, time, torch
torch.set_num_threads(1)
a = torch.randn(512, 512)
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    a @ a
"""


@contextmanager
def contention(processes: int, seconds: float) -> Iterator[None]:
    """That many other processes want a core each; they end by themselves after `seconds`."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _BUSY, str(seconds)], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for _ in range(processes)
    ]
    try:
        time.sleep(2.0 if running else 0.0)  # until they have imported and turn
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
