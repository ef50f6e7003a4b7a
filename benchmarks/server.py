"""How this service stands under load, beside other servers and beside no server at all.

    python -m benchmarks server                        the tiny network, every server, npy bodies
    python -m benchmarks server --network RepVGG-A0    the real one, with its in-process bound
    python -m benchmarks server --bodies jpeg,json     other bodies
    python -m benchmarks server --peers none           this service alone

Every server runs on the same machine, serves the same fused network and is asked by the same
client. They are measured in turns: each round visits every server for every kind of load, in an
order that rotates, and a ratio compares two measurements of the same round. The first answers of
every server are compared with the network's own, so that nobody is fast by being wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import peers, promises
from benchmarks.server_report import Cell, Measured, render
from benchmarks.subjects import (
    Server,
    Settings,
    Subject,
    Unavailable,
    foldserve_logits,
    start_bound,
    start_foldserve,
    start_foldserve_apart,
    start_nothing,
    start_peer,
)
from benchmarks.workload import BODIES, NETWORKS, Body, Deployed, Network, Sample, samples
from service.serving import available_cpus
from service.serving.backends.machine import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
CONCURRENCIES = (1, 8, 64, 256)
SPAWN_SECONDS = 0.8  # what starting the load and letting the server settle add to a measurement
# A slow network needs longer windows where many callers wait, or too few answers fall into one.
LONGER = {1: 1.0, 8: 1.0, 64: 2.0, 256: 4.0}
TOLERANCE = {"binary": 1e-3, "json": 1e-3, "jpeg": 0.05}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is stopped
    options = _parser().parse_args(arguments)
    network = NETWORKS[options.network]
    if options.http_processes is None:
        options.http_processes = 2 if network.name == "tiny" else 1
    if options.threads is None:  # threads that wait for each other only slow a tiny network down
        options.threads = 1 if network.name == "tiny" else available_cpus()
    cells = [Cell(body, n) for body in options.bodies for n in options.concurrency]
    given = samples(network)
    began = time.time()
    with ExitStack() as stack, TemporaryDirectory(prefix="foldserve-benchmark-") as name:
        folder = Path(name)
        subjects, missing = _start(stack, folder, network, given, options)
        measured = list(_rounds(subjects, cells, options, network.name != "tiny"))
    report = {
        "network": network.name,
        "row": list(network.shape),
        "environment": environment(options.threads) | {"seconds": round(time.time() - began)},
        "subjects": {subject.name: subject.about for subject in subjects},
        "missing": missing,
        "measured": [asdict(one) for one in measured],
    }
    text = "\n".join(render(report, cells, measured, [subject.name for subject in subjects]))
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = f"server-{network.name.lower()}-{'-'.join(options.bodies)}"
        (options.out / f"{stem}.md").write_text(text + "\n")
        (options.out / f"{stem}.json").write_text(json.dumps(report) + "\n")
    return 0


def environment(threads: int) -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    packages = ("torch", "openvino", "fastapi", "uvicorn", "uvloop", "httptools", "numpy", "orjson")
    return {
        "cpu": cpu_name(),
        "cpus": available_cpus(),
        "threads": threads,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "load_average_before": round(os.getloadavg()[0], 2),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _start(
    stack: ExitStack,
    folder: Path,
    network: Network,
    given: list[Sample],
    options: argparse.Namespace,
) -> tuple[list[Subject], dict[str, str]]:
    """Everything that starts here, and the reasons of what does not."""
    own = Settings(
        {"FOLDSERVE_TORCH_THREADS": str(options.threads), "OMP_NUM_THREADS": str(options.threads)},
        {"backend": options.backend, "precision": "float32"},
    )
    foldserve = start_foldserve(stack, folder, network, given, own)
    reference = Deployed(folder)
    check(foldserve, reference, given)
    subjects: list[Subject] = [foldserve]
    if options.http_processes > 1:
        several = start_foldserve_apart(stack, folder, network, given, own, options.http_processes)
        check(several, reference, given)
        subjects.append(several)
    missing: dict[str, str] = {}
    for name in options.peers:
        try:
            print(f"starting {name}", file=sys.stderr, flush=True)
            peer = peers.PEERS[name]
            server = start_peer(stack, peer, options.installed, folder, given, options.threads)
            check(server, reference, given)
        except (Unavailable, LookupError) as error:
            missing[name] = str(error)
        else:
            subjects.append(server)
    subjects.append(start_nothing(stack, folder, given))
    if network.name != "tiny":
        subjects.append(start_bound(stack, folder, options.threads))
    return subjects, missing


def check(server: Server, reference: Deployed, given: list[Sample]) -> None:
    """Raises Unavailable unless the server's answers are the network's, row by row."""
    for body in server.requests:
        for index, answer in enumerate(server.answers(body)):
            truth = reference(reference.row(_content(body, given[index]))[None])[0]
            if server.name in (promises.OWN, promises.OWN_SEVERAL):
                found = foldserve_logits(body, answer)
                if body == "json":  # the largest scores, in descending order
                    truth = np.sort(truth - np.log(np.exp(truth).sum()))[::-1][: len(found)]
            else:
                found = peers.PEERS[server.name].decode(answer)
            error = np.abs(found - truth).max() / max(np.abs(truth).max(), 1e-9)
            if found.shape != truth.shape or not error < TOLERANCE[body]:
                raise Unavailable(f"answers {body} wrongly: relative error {error:.1e}")


def _content(body: Body, sample: Sample) -> bytes:
    if body == "json":
        return json.dumps({"inputs": sample.nested}).encode()
    return sample.raw if body == "binary" else sample.photo


def _rounds(
    subjects: list[Subject], cells: list[Cell], options: argparse.Namespace, slow: bool
) -> Iterator[Measured]:
    weights = {cell: LONGER.get(cell.concurrency, 1.0) if slow else 1.0 for cell in cells}
    total = sum(weights.values()) * len(subjects) * options.rounds
    overhead = SPAWN_SECONDS * len(cells) * len(subjects) * options.rounds
    unit = max(0.5, (options.seconds - overhead) / total / 1.2)
    for number in range(options.rounds):
        for cell in cells:
            turn = number % len(subjects)
            for subject in subjects[turn:] + subjects[:turn]:
                outcome = subject.measure(cell.body, cell.concurrency, unit * weights[cell])
                if outcome is not None:
                    print(
                        f"round {number + 1}  {cell.body} x {cell.concurrency:<4}"
                        f"{subject.name:12} {outcome.rate:10.1f}/s  p99 {outcome.p99 * 1e3:.1f} ms",
                        file=sys.stderr,
                        flush=True,
                    )
                    yield Measured(number, cell, subject.name, outcome)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="tiny", choices=sorted(NETWORKS))
    parser.add_argument("--bodies", type=_bodies, default=["binary"], help="of binary,jpeg,json")
    parser.add_argument("--concurrency", type=_numbers, default=list(CONCURRENCIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=400.0, help="measuring time in all")
    parser.add_argument("--backend", default="auto", help="this service's backend")
    parser.add_argument("--threads", type=int, help="CPU threads each; 1 for tiny, else all")
    parser.add_argument(
        "--http-processes", type=int, help="measure this service with so many too; 2 for tiny"
    )
    parser.add_argument("--peers", type=_peers, default=list(peers.PEERS), help="names, or none")
    parser.add_argument("--installed", type=Path, default=peers.home(), help="peers' environments")
    parser.add_argument("--out", type=Path, help=f"also write the report here, such as {RESULTS}")
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _bodies(text: str) -> list[Body]:
    return [body for body in BODIES if body in text.split(",")]


def _peers(text: str) -> list[str]:
    names = [] if text == "none" else text.split(",")
    unknown = set(names) - set(peers.PEERS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
