"""Is decoding held up by Python's lock? Threads of one process against processes, same work.

    python -m benchmarks decoding

Several HTTP processes in front of one device process pay when the threads of one process cannot use
the cores. Decoding and preprocessing a photograph is the largest work that this service does beside
the model, and most of it runs without the lock. Every round decodes the same photographs with one
thread, with a thread for each CPU, and with a process for each CPU; ratios are within a round. Each
way also runs beside a thread that never gives the lock away by itself, as a busy event loop would.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import PIL

from benchmarks.workload import NETWORKS, samples
from service.api.images import decode, recipe
from service.serving import available_cpus
from service.serving.backends.machine import cpu_name

_HOW = recipe(NETWORKS["RepVGG-A0"].shape, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=200, help="photographs a measurement")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args(arguments)
    text = "\n".join(_report(options.rounds, options.images))
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decoding.md").write_text(text + "\n")
    return 0


def work(photo: bytes) -> float:
    """Decode one photograph; answers one of its values, so that nothing large is sent back."""
    assert _HOW is not None
    return float(decode(photo, _HOW, 10**8)[0, 0, 0])


def _report(rounds: int, images: int) -> Iterator[str]:
    cpus = available_cpus()
    photos = [one.photo for one in samples(NETWORKS["RepVGG-A0"])] * (images // 4)
    yield "# Decoding: threads against processes\n"
    yield (
        f"{cpu_name()}, {cpus} CPUs; Python {platform.python_version()}, Pillow "
        f"{PIL.__version__}; load average before: {os.getloadavg()[0]:.2f}; "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.\n"
    )
    yield f"{len(photos)} photographs of 500x375 to rows of 3x224x224, {rounds} rounds; medians"
    yield "with the lowest and highest. Ratios are to one thread in the same round.\n"
    yield "| how | images/s | to one thread | images/s beside a busy thread | to one thread |"
    yield "|---|---|---|---|---|"
    spawn = get_context("forkserver")
    ways: dict[str, Callable[[], Executor]] = {
        "one thread": lambda: ThreadPoolExecutor(1),
        f"{cpus} threads": lambda: ThreadPoolExecutor(cpus),
        f"{cpus} processes": lambda: ProcessPoolExecutor(cpus, spawn),
    }
    pools = {name: make() for name, make in ways.items()}
    rates: dict[tuple[str, bool], list[float]] = {}
    for pool in pools.values():
        list(pool.map(work, photos[: 4 * cpus]))  # start everything
    for _ in range(rounds):
        for name, pool in pools.items():
            for busy in (False, True):
                with _busy_thread(busy):
                    began = time.perf_counter()
                    list(pool.map(work, photos, chunksize=4))
                    seconds = time.perf_counter() - began
                rates.setdefault((name, busy), []).append(len(photos) / seconds)
    for name, pool in pools.items():
        pool.shutdown()
        cells = [name]
        for busy in (False, True):
            mine, one = rates[name, busy], rates["one thread", busy]
            cells.append(_spread(mine, 0))
            cells.append(_spread([a / b for a, b in zip(mine, one, strict=True)], 2))
        yield f"| {' | '.join(cells)} |"


@contextmanager
def _busy_thread(wanted: bool) -> Iterator[None]:
    """A thread of pure Python while the body runs."""
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(200))

    thread = threading.Thread(target=spin, daemon=True)
    if wanted:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if wanted:
            thread.join()


def _spread(values: list[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{statistics.median(values):.{digits}f} ({low} to {high})"


if __name__ == "__main__":
    sys.exit(main())
