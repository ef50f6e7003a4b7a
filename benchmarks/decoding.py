"""Is reading requests held up by Python's lock? Threads of one process against several processes.

    python -m benchmarks decoding

Several HTTP processes in front of one device process pay when the threads of one process cannot use
the cores. What each would do for a request is measured here: turn its body (a photograph, JSON,
npy) into a row, and bring the row to where batches are made. Threads hand over the array that they
made; processes write it into memory that they share with the process of the device, and say where.
Every round does the same with one thread, with a thread for each CPU, and with a process for each
CPU; ratios are within a round. Each way also runs beside a thread that never gives the lock away by
itself, as a busy event loop would. Processes have that thread in the process of the device alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from benchmarks.workload import NETWORKS, SAMPLES, Floats, Sample, samples
from service.api import tensors
from service.api.images import decode, recipe
from service.serving import available_cpus
from service.serving.backends.machine import cpu_name

SLOTS = 32
KINDS = ("jpeg", "json", "npy")
_NETWORK = NETWORKS["RepVGG-A0"]
_HOW = recipe(_NETWORK.shape, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=100, help="bodies a measurement")
    parser.add_argument("--out", type=Path, help="also write the report here")
    options = parser.parse_args(arguments)
    text = "\n".join(_report(options.rounds, options.requests))
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decoding.md").write_text(text + "\n")
    return 0


def _body(kind: str, sample: Sample) -> bytes:
    if kind == "json":
        return json.dumps({"inputs": sample.nested}).encode()
    return sample.photo if kind == "jpeg" else sample.npy


def read(kind: str, body: bytes) -> Floats:
    """One row [3, side, side] of a body, as predictions read it."""
    if kind == "jpeg":
        assert _HOW is not None
        return decode(body, _HOW, 10**8)
    rows = tensors.from_json if kind == "json" else tensors.from_npy
    row: Floats = np.asarray(rows(body, _NETWORK.shape)[0], np.float32)
    return row


class Apart:
    """Rows read by processes, which write them into `SLOTS` places of shared memory."""

    def __init__(self, stack: ExitStack, processes: int) -> None:
        size = 4 * SLOTS * int(np.prod(_NETWORK.shape))
        memory = SharedMemory(create=True, size=size)
        stack.callback(memory.unlink)
        stack.callback(memory.close)
        self._rows: Any = _slots(memory)
        stack.callback(self.__dict__.clear)  # views must go before the memory
        self._pool = stack.enter_context(
            ProcessPoolExecutor(processes, get_context("spawn"), _attach, (memory.name,))
        )

    def run(self, kind: str, count: int, batch: Floats) -> None:
        """Bring `count` rows into `batch`, one after the other."""
        jobs = [(kind, index % SAMPLES, index % SLOTS) for index in range(count)]
        for index, slot in enumerate(self._pool.map(_write, jobs, chunksize=4)):
            batch[index % len(batch)] = self._rows[slot]


class Together:
    """Rows read by threads of this process."""

    def __init__(self, stack: ExitStack, threads: int) -> None:
        self._pool = stack.enter_context(ThreadPoolExecutor(threads))
        self._bodies = _bodies()

    def run(self, kind: str, count: int, batch: Floats) -> None:
        """The same."""
        bodies = [self._bodies[kind][index % SAMPLES] for index in range(count)]
        for index, row in enumerate(self._pool.map(lambda body: read(kind, body), bodies)):
            batch[index % len(batch)] = row


def _bodies() -> dict[str, list[bytes]]:
    given = samples(_NETWORK)
    return {kind: [_body(kind, sample) for sample in given] for kind in KINDS}


def _slots(memory: SharedMemory) -> Any:
    return np.ndarray((SLOTS, *_NETWORK.shape), np.float32, buffer=memory.buf)


_HERE: dict[str, Any] = {}


def _attach(name: str) -> None:
    memory = SharedMemory(name)
    _HERE.update(memory=memory, rows=_slots(memory), bodies=_bodies())


def _write(job: tuple[str, int, int]) -> int:
    kind, sample, slot = job
    _HERE["rows"][slot] = read(kind, _HERE["bodies"][kind][sample])
    return slot


def _report(rounds: int, count: int) -> Iterator[str]:
    cpus = available_cpus()
    yield "# Reading bodies: threads against processes over shared memory\n"
    yield (
        f"{cpu_name()}, {cpus} CPUs; Python {platform.python_version()}, Pillow "
        f"{PIL.__version__}; load average before: {os.getloadavg()[0]:.2f}; "
        f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.\n"
    )
    yield f"{count} bodies to rows of 3x224x224 (photographs have 500x375), {rounds} rounds;"
    yield "medians with the lowest and highest. Ratios are to one thread in the same round.\n"
    yield "| body | how | rows/s | to one thread | rows/s beside a busy thread | to one thread |"
    yield "|---|---|---|---|---|---|"
    with ExitStack() as stack:
        ways: dict[str, Apart | Together] = {
            "one thread": Together(stack, 1),
            f"{cpus} threads": Together(stack, cpus),
            f"{cpus} processes": Apart(stack, cpus),
        }
        rates = _measure(ways, rounds, count)
    for kind in KINDS:
        for name in ways:
            cells = [kind, name]
            for busy in (False, True):
                mine, one = rates[kind, name, busy], rates[kind, "one thread", busy]
                cells.append(_spread(mine, 0))
                cells.append(_spread([a / b for a, b in zip(mine, one, strict=True)], 2))
            yield f"| {' | '.join(cells)} |"


def _measure(
    ways: dict[str, Apart | Together], rounds: int, count: int
) -> dict[tuple[str, str, bool], list[float]]:
    rates: dict[tuple[str, str, bool], list[float]] = {}
    truth = {kind: [read(kind, body) for body in bodies] for kind, bodies in _bodies().items()}
    for number in range(-1, rounds):  # the first one starts everything and is looked at only
        for kind in KINDS:
            for name, way in ways.items():
                for busy in (False, True):
                    batch = np.zeros((SLOTS, *_NETWORK.shape), np.float32)
                    with _busy_thread(busy):
                        began = time.perf_counter()
                        way.run(kind, count, batch)
                        seconds = time.perf_counter() - began
                    if not np.array_equal(batch[0], truth[kind][0]):
                        raise AssertionError(f"{name} brought another row than {kind} holds")
                    if number >= 0:
                        rates.setdefault((kind, name, busy), []).append(count / seconds)
    return rates


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
