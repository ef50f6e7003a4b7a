"""One process for HTTP and device, or several HTTP processes in front of one device process.

    python -m benchmarks fronts                        1, 2 and 4 HTTP processes, under 4 minutes
    python -m benchmarks fronts --processes 1,2,4,8    on a machine with more cores

Every service runs the same two networks, which compute almost nothing, so that what is measured is
HTTP and the way of the rows to the device: `row`, one small row as npy, and `batch`, 64 rows of
3x224x224 float32 as one npy body of 38.5 MB. They are measured in turns by the same client; a ratio
compares two measurements of the same round. The one-process service is started twice: how far it
differs from itself is what a difference has to exceed. The client is one process: where it needs
a whole core (`client CPU`), it is the client that was measured.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import httpx
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.load import Outcome
from benchmarks.server import environment
from benchmarks.subjects import NPY, Process, Server, Unavailable, ready_port
from benchmarks.workload import http_request
from service import pack

What = Literal["row", "batch"]
RESULTS = Path(__file__).resolve().parent / "results"
CONTROL = "1 again"
CELLS: tuple[tuple[What, int], ...] = (
    ("row", 1),
    ("row", 8),
    ("row", 64),
    ("batch", 1),
    ("batch", 4),
)
COLUMNS = (
    "HTTP processes",
    "requests/s",
    "over 1",
    "p50 ms",
    "p99 ms",
    "failed",
    "server CPU ms",
    "of it the device process",
    "client CPU",
)
SHAPES: Mapping[What, tuple[int, ...]] = {"row": (1, 3, 32, 32), "batch": (64, 3, 224, 224)}
LONGER: Mapping[What, float] = {"row": 1.0, "batch": 3.0}  # few answers fall into a short window
AROUND_SECONDS = 1.5  # what starting the load and letting the server settle add to a measurement


class Little(nn.Module):
    """Two parallel convolutions that look at one pixel of 16 x 16: as little as can be fused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 10, 1, stride=16)
        self.two = nn.Conv2d(3, 10, 1, stride=16)

    def forward(self, rows: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, 10]."""
        means: Tensor = (self.one(rows) + self.two(rows)).mean((2, 3))
        return means


@dataclass(frozen=True)
class Measured:
    """One measurement: its round, what was sent by how many at once, to which service."""

    round: int
    what: What
    concurrency: int
    subject: str
    outcome: Outcome
    device_cpu: float
    """CPU time for one answer, in seconds, of the process that computes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    options = _parser().parse_args(arguments)
    bodies = {what: _body(what) for what in SHAPES}
    began = time.time()
    where = environment(options.threads)
    where["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    with ExitStack() as stack, TemporaryDirectory(prefix="foldserve-benchmark-") as name:
        names = [str(number) for number in options.processes]
        names.insert(1, CONTROL)
        subjects = {
            each: _start(stack, Path(name) / each.replace(" ", "-"), each, options, bodies)
            for each in names
        }
        _check(subjects)
        measured = list(_rounds(subjects, options))
    where["seconds"] = round(time.time() - began)
    text = "\n".join(_render(where, names, measured))
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fronts.md").write_text(text + "\n")
        data = {"environment": where, "measured": [asdict(one) for one in measured]}
        (options.out / "fronts.json").write_text(json.dumps(data) + "\n")
    return 0


def _body(what: What) -> bytes:
    rows = np.random.default_rng(0).normal(size=SHAPES[what]).astype(np.float32)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def _start(
    stack: ExitStack,
    folder: Path,
    name: str,
    options: argparse.Namespace,
    bodies: Mapping[What, bytes],
) -> dict[What, Server]:
    """A service with both networks, as a server for each of them."""
    print(f"starting with {name} HTTP processes", file=sys.stderr, flush=True)
    folder.mkdir()
    process = Process(
        [
            *(sys.executable, "-m", "service.cli", "serve", "--port", "0"),
            *("--data-dir", str(folder / "data"), "--http-processes", name.split()[0]),
        ],
        folder / "foldserve.log",
        {
            "FOLDSERVE_LOG_FORMAT": "json",
            "FOLDSERVE_BACKEND": options.backend,
            "FOLDSERVE_MAX_BATCH": "64",
            "FOLDSERVE_TORCH_THREADS": str(options.threads),
            "OMP_NUM_THREADS": str(options.threads),
        },
    )
    stack.callback(process.stop)
    port = ready_port(process)
    servers: dict[What, Server] = {}
    for what, shape in SHAPES.items():
        bundle = folder / f"{what}.safetensors"
        pack(Little().eval(), (torch.zeros(2, *shape[1:]),), bundle)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/models/{what}/versions",
            content=bundle.read_bytes(),
            headers={"Content-Type": "application/octet-stream", "Prefer": "wait=120"},
            timeout=130,
        )
        if answer.status_code != 201:
            raise Unavailable(answer.text)
        path = f"/v1/models/{what}/predict"
        request = http_request(path, bodies[what], content_type=NPY, accept=NPY)
        servers[what] = Server(name, "", process, port, {"binary": (request,)})
    return servers


def _check(subjects: Mapping[str, Mapping[What, Server]]) -> None:
    """Raises Unavailable unless all answer the same, and what the network does."""
    for what, shape in SHAPES.items():
        rows = torch.from_numpy(np.load(io.BytesIO(_body(what))))
        with torch.inference_mode():
            truth = Little().eval()(rows).numpy()
        for name, servers in subjects.items():
            (answer,) = servers[what].answers("binary")
            found = np.load(io.BytesIO(answer))
            if found.shape != (shape[0], 10) or not np.allclose(found, truth, atol=1e-3):
                raise Unavailable(f"{name} HTTP processes answer {what} wrongly")


def _rounds(
    subjects: Mapping[str, Mapping[What, Server]], options: argparse.Namespace
) -> Iterator[Measured]:
    turns = len(subjects) * options.rounds
    measuring = options.seconds - AROUND_SECONDS * len(CELLS) * turns
    unit = max(0.5, measuring / (1.2 * turns * sum(LONGER[what] for what, _ in CELLS)))
    names = list(subjects)
    for number in range(options.rounds):
        for what, concurrency in CELLS:
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                server = subjects[name][what]
                before = server.own_cpu_seconds()
                outcome = server.measure("binary", concurrency, unit * LONGER[what])
                assert outcome is not None
                print(
                    f"round {number + 1}  {what} x {concurrency:<3} {name:8}"
                    f"{outcome.rate:10.1f}/s  p99 {outcome.p99 * 1e3:.1f} ms",
                    file=sys.stderr,
                    flush=True,
                )
                device = (server.own_cpu_seconds() - before) / max(1, outcome.served)
                yield Measured(number, what, concurrency, name, outcome, device)


def _render(
    where: Mapping[str, Any], names: Sequence[str], measured: Sequence[Measured]
) -> Iterator[str]:
    yield "# One process, or several HTTP processes in front of one device process\n"
    yield (
        f"{where['cpu']}, {where['cpus']} CPUs; device: {where['gpu'] or 'the CPU'}; "
        f"{where['threads']} compute threads; Python {where['python']}; "
        f"load average before: {where['load_average_before']}; {where['when']}; "
        f"{where['seconds']} s.  "
    )
    yield ", ".join(f"{name} {found}" for name, found in where["versions"].items()) + ".\n"
    yield "Medians over the rounds with the lowest and highest in brackets; a ratio is of the same"
    yield f"round. `{CONTROL}` is a second service with one process. Server CPU is what all its"
    yield "processes spent for one answer; with cores for all of them no service is faster than its"
    yield "device process, whose event loop is one thread. Client CPU is the share of a core that"
    yield "the client used: near 1, its pace is what was measured."
    for what, concurrency in CELLS:
        rows = " x ".join(map(str, SHAPES[what]))
        yield f"\n## {what} ({rows} float32), concurrency {concurrency}\n"
        yield f"| {' | '.join(COLUMNS)} |\n|---:|---|---|---|---|---:|---:|---:|---:|"
        found = {
            name: [
                one
                for one in measured
                if (one.what, one.concurrency, one.subject) == (what, concurrency, name)
            ]
            for name in names
        }
        ratios = {name: _ratios(ones, found[names[0]]) for name, ones in found.items()}
        yield from (_row(name, found[name], ratios[name]) for name in names)
        yield f"\n{_verdict(names, ratios)}"


def _row(name: str, ones: Sequence[Measured], ratios: Sequence[float]) -> str:
    outcomes = [one.outcome for one in ones]
    p50, p99 = (_spread([getattr(one, key) * 1e3 for one in outcomes]) for key in ("p50", "p99"))
    cells = (
        name,
        _spread([one.rate for one in outcomes]),
        _spread(ratios),
        p50,
        p99,
        sum(one.failed for one in outcomes),
        f"{statistics.median(one.server_cpu for one in outcomes) * 1e3:.2f}",
        f"{statistics.median(one.device_cpu for one in ones) * 1e3:.2f}",
        f"{statistics.median(one.client_cpu for one in outcomes):.2f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _ratios(several: Sequence[Measured], one: Sequence[Measured]) -> list[float]:
    pairs = zip(several, one, strict=True)
    return [a.outcome.rate / max(b.outcome.rate, 1e-9) for a, b in pairs]


def _verdict(names: Sequence[str], ratios: Mapping[str, Sequence[float]]) -> str:
    """Who wins here: several only where every round says so, by more than the control differs."""
    noise = max(abs(ratio - 1) for ratio in ratios[CONTROL])
    several = [name for name in names[1:] if name != CONTROL]
    best = max(several, key=lambda name: statistics.median(ratios[name]))
    said = f"{best} HTTP processes reach {_spread(ratios[best])} of one process's rate"
    if min(ratios[best]) > 1 + noise:
        return f"**Several HTTP processes win**: {said}; the control differs by {noise:.2f}."
    if max(ratios[best]) < 1 - noise:
        return f"**One process wins**: {said} at best; the control differs by {noise:.2f}."
    return f"**Undecided**: {said} at best, and the control differs by {noise:.2f}."


def _spread(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    places = 0 if middle >= 100 else 2
    return f"{middle:.{places}f} ({min(values):.{places}f} to {max(values):.{places}f})"


def _processes(text: str) -> list[int]:
    numbers = sorted({1, *(int(part) for part in text.split(","))})
    if len(numbers) < 2 or numbers[0] < 1:
        raise argparse.ArgumentTypeError("name at least one number above 1")
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=_processes, default=[1, 2, 4], help="such as 1,2,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=150.0, help="measuring time in all")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of every service")
    parser.add_argument("--backend", default="torch", help="what computes")
    parser.add_argument("--out", type=Path, help=f"also write the report here, such as {RESULTS}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
