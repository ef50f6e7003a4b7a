"""One GPU fed over HTTP: images a second, against what the same batches reach in one process.

    python -m benchmarks gpu_server           RepVGG-A0 at 224x224; under two minutes

Every request carries a batch of images, as grey levels or as float32 rows, in one npy body. Several
client processes send them as fast as they get answers, to a service with one HTTP process and to
one with several in front of the device process. The bound is this process handing the same bodies'
rows to the same engine, without HTTP, two batches at a time. All are measured in turns; a ratio
compares two measurements of the same round.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks.arms import RESULTS, heading, save
from benchmarks.engine import network, numbers
from benchmarks.gpu import LEVELS
from benchmarks.load import Outcome, Plan
from benchmarks.subjects import NPY, ROOT, Process, Unavailable, ready_port
from benchmarks.workload import http_request
from service.fusion import fuse
from service.graph import Program, trace
from service.networks import known_names
from service.serving import BatchPart
from service.serving.backends.torch_backend import TorchBackend

BOUND = "in one process, without HTTP"
COLUMNS = ("way", "images/s", "of the bound", "failed", "server's CPU cores", "clients' cores")


@dataclass(frozen=True)
class Turn:
    """What one way did in one round."""

    way: str
    images: float
    failed: int = 0
    server_cores: float = 0.0
    client_cores: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status, 2 without the device."""
    options = _parser().parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 2
    module = network(options.network, 0).eval()
    example = torch.zeros(1, 3, options.size, options.size)
    deploy = fuse(trace(module, (example,))).program
    lines: list[str] = []
    data: dict[str, Any] = {"environment": heading(torch.get_num_threads()), "measured": {}}
    with ExitStack() as stack, TemporaryDirectory(prefix="foldserve-benchmark-") as name:
        folder = Path(name)
        torch.save(module.state_dict(), folder / "train.pth")
        for precision in options.precisions:
            services = {  # one after the other: each measures what is fastest on this device
                count: _service(stack, folder / f"{precision}-{count}", count, precision, options)
                for count in options.processes
            }
            for kind in options.bodies:
                turns = list(_rounds(services, deploy, precision, kind, options))
                title = f"{precision}, {options.batch} images a request as {kind}"
                found = list(_table(turns))
                print(f"{title}\n" + "\n".join(found), flush=True)
                lines += ["", f"## {title}", "", *found]
                data["measured"][title] = [vars(turn) for turn in turns]
            for process, _ in services.values():
                process.stop()
    save("gpu-server", f"One GPU over HTTP: {options.network}", data, lines, options.out)
    return 0


def _service(
    stack: ExitStack, folder: Path, count: int, precision: str, options: argparse.Namespace
) -> tuple[Process, int]:
    folder.mkdir()
    process = Process(
        [
            *(sys.executable, "-m", "service.cli", "serve", "--port", "0"),
            *("--data-dir", str(folder / "data"), "--http-processes", str(count)),
        ],
        folder / "foldserve.log",
        {
            "FOLDSERVE_LOG_FORMAT": "json",
            "FOLDSERVE_ACCESS_LOG": "false",
            "FOLDSERVE_DEVICE": options.device.split(":")[0],
            "FOLDSERVE_BACKEND": "torch",
            "FOLDSERVE_MAX_BATCH": str(options.batch),
            "FOLDSERVE_QUEUE_ROWS": str(64 * options.batch),
        },
    )
    stack.callback(process.stop)
    port = ready_port(process)
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/models/net/versions",
        files={"checkpoint": (folder.parent / "train.pth").read_bytes()},
        data={
            "config": json.dumps(
                {
                    "architecture": options.network,
                    "input_shape": [3, options.size, options.size],
                    "precision": precision,
                }
            )
        },
        headers={"Prefer": "wait=120"},
        timeout=130,
    )
    if answer.status_code != 201:
        raise Unavailable(f"{answer.text}\n{process.log()[-2000:]}")
    execution = answer.json().get("execution")
    print(f"{count} HTTP processes, {precision}: {json.dumps(execution)}", flush=True)
    return process, port


def _body(kind: str, options: argparse.Namespace) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(0)
    side = options.size
    if kind == "uint8":
        return random.integers(0, 256, (options.batch, side, side, 3), dtype=np.uint8)
    return random.normal(size=(options.batch, 3, side, side)).astype(np.float32)


def _rounds(
    services: Mapping[int, tuple[Process, int]],
    deploy: Program,
    precision: str,
    kind: str,
    options: argparse.Namespace,
) -> Iterator[Turn]:
    rows = _body(kind, options)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    request = http_request(
        "/v1/models/net/predict", buffer.getvalue(), content_type=NPY, accept=NPY
    )
    bound, close = _bound(rows, deploy, precision, options)
    _ask(services, request, options, 1.0)  # everything is warm after this, its memory too
    for _ in range(options.rounds):
        yield Turn(BOUND, bound(options.seconds))
        for count, (process, port) in services.items():
            yield _over_http(process, port, count, request, options, options.seconds)
    close()


def _bound(
    rows: np.ndarray[Any, Any], deploy: Program, precision: Any, options: argparse.Namespace
) -> tuple[Callable[[float], float], Callable[[], None]]:
    """What says how many images a second go through the engine by itself, and ends it."""
    prepared = TorchBackend().prepare(deploy, options.device, precision, (1, options.batch))
    for _ in prepared.warm():
        pass
    tensor = torch.from_numpy(rows)
    streams = prepared.streams
    levels = LEVELS if rows.dtype == np.uint8 else None

    def once() -> None:
        if streams is not None and streams.parts is not None:
            streams.parts([BatchPart((tensor,), levels)])
        else:
            prepared.run((tensor.permute(0, 3, 1, 2).float() if levels else tensor,))

    def rate(seconds: float) -> float:
        done: list[int] = []
        begin = time.perf_counter()

        def work() -> None:
            count = 0
            while time.perf_counter() < begin + seconds:
                once()
                count += 1
            done.append(count)

        workers = [threading.Thread(target=work) for _ in range(streams.count if streams else 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(done) * len(rows) / (time.perf_counter() - begin)

    return rate, prepared.close


def _ask(
    services: Mapping[int, tuple[Process, int]],
    request: bytes,
    options: argparse.Namespace,
    seconds: float,
) -> None:
    for count, (process, port) in services.items():
        turn = _over_http(process, port, count, request, options, seconds)
        if turn.failed or not turn.images:
            raise Unavailable(f"{turn}\n{process.log()[-2000:]}")


def _over_http(
    process: Process,
    port: int,
    count: int,
    request: bytes,
    options: argparse.Namespace,
    seconds: float,
) -> Turn:
    plan = Plan("127.0.0.1", port, (request,), options.connections, 0.3, seconds)
    clients = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(options.clients)
    ]
    before, began = process.cpu_seconds(), time.perf_counter()
    told: list[str] = [""] * len(clients)

    def ask(index: int) -> None:
        told[index] = clients[index].communicate(plan.to_json())[0]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    used = process.cpu_seconds() - before
    outcomes = [Outcome(**json.loads(text)) for text in told]
    return Turn(
        f"{count} HTTP process{'es' if count > 1 else ''}",
        sum(outcome.rate for outcome in outcomes) * options.batch,
        sum(outcome.failed for outcome in outcomes),
        used / elapsed,
        sum(outcome.client_cpu for outcome in outcomes),
    )


def _table(turns: Sequence[Turn]) -> Iterator[str]:
    """Medians over the rounds, with the lowest and the highest."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---|---|---|---:|---:|---:|"
    bound = [turn.images for turn in turns if turn.way == BOUND]
    for way in dict.fromkeys(turn.way for turn in turns):
        own = [turn for turn in turns if turn.way == way]
        shares = [turn.images / limit for turn, limit in zip(own, bound, strict=True)]
        images = [turn.images for turn in own]
        yield (
            f"| {way} | {statistics.median(images):,.0f} ({min(images):,.0f} to {max(images):,.0f})"
            f" | {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
            f" | {sum(turn.failed for turn in own)}"
            f" | {statistics.median(turn.server_cores for turn in own):.1f}"
            f" | {statistics.median(turn.client_cores for turn in own):.1f} |"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="RepVGG-A0", choices=known_names(), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=128, help="images a request")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["float32"])
    parser.add_argument("--bodies", type=lambda text: text.split(","), default=["uint8", "float32"])
    parser.add_argument("--processes", type=numbers, default=[1, 4], help="HTTP processes")
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--connections", type=int, default=2, help="connections of each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="each measurement")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
