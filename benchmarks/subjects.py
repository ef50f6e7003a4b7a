"""What the server benchmark measures, behind one interface: this service, the peers, two bounds."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import torch

from benchmarks import promises
from benchmarks.load import Outcome, Plan
from benchmarks.peers import Peer
from benchmarks.workload import Body, Floats, Network, Sample, http_request, json_request

SETTLE_SECONDS = 20
START_SECONDS = 120
STOP_SECONDS = 20
ROOT = Path(__file__).resolve().parents[1]
ARRAYS = "application/vnd.foldserve.arrays+json"
NPY = "application/x-npy"


class Unavailable(Exception):
    """A subject that does not install, start or answer here; the text says why."""


class Subject(Protocol):
    """Something whose throughput can be measured."""

    name: str
    about: str

    def measure(self, body: Body, concurrency: int, seconds: float) -> Outcome | None:
        """Load it; None when it does not take such bodies."""
        ...


class Process:
    """A child in a session of its own that is ended, with all its children, on leaving."""

    def __init__(
        self, command: list[str], log: Path, environment: Mapping[str, str], **pipes: Any
    ) -> None:
        self._log = log
        with log.open("wb") as errors:
            self.child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stderr=errors,
                stdout=pipes.pop("stdout", errors),
                start_new_session=True,
                **pipes,
            )

    def check(self) -> None:
        """Raises Unavailable with the end of the log once the child has ended."""
        if self.child.poll() is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines() or ["no output"]
            raise Unavailable(f"ended with {self.child.returncode}: {lines[-1][:300]}")

    def cpu_seconds(self) -> float:
        """CPU time of every process of the session so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # ended meanwhile
                continue
            if int(fields[3]) == self.child.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def own_cpu_seconds(self) -> float:
        """CPU time of the child alone, without its children, so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """SIGTERM, then SIGKILL, to the whole session."""
        for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 5)):
            try:
                os.killpg(self.child.pid, number)
            except ProcessLookupError:
                break
            try:
                self.child.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()


class Server:
    """A server under load: how its requests are made and where it listens."""

    def __init__(
        self,
        name: str,
        about: str,
        process: Process,
        port: int,
        requests: Mapping[Body, tuple[bytes, ...]],
        inside: tuple[str, ...] = (),
    ) -> None:
        """`inside` is put before the load's command, to run it in the server's namespace."""
        self.name, self.about, self.port = name, about, port
        self.requests = requests
        self._process = process
        self._inside = inside

    def measure(self, body: Body, concurrency: int, seconds: float) -> Outcome | None:
        requests = self.requests.get(body)
        if requests is None:
            return None
        warm = max(0.2, 0.2 * seconds)
        before = self._process.cpu_seconds()
        outcome = self._load(Plan("127.0.0.1", self.port, requests, concurrency, warm, seconds))
        self._settle()
        used = self._process.cpu_seconds() - before
        return replace(outcome, server_cpu=used / max(1, outcome.served))

    def _settle(self) -> None:
        """Wait until it computes no longer for those who left, or the next one would pay for it."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            before = self._process.cpu_seconds()
            time.sleep(0.25)
            if self._process.cpu_seconds() - before < 0.05:
                return

    def own_cpu_seconds(self) -> float:
        """CPU time of its first process alone so far."""
        return self._process.own_cpu_seconds()

    def answers(self, body: Body) -> list[bytes]:
        """The bodies of its answers to one round of requests."""
        outcome = self._load(Plan("127.0.0.1", self.port, self.requests[body], capture=True))
        if outcome.failed:
            raise Unavailable(f"answers {body} with {outcome.statuses}: {outcome.bodies[:1]}")
        return [base64.b64decode(answer) for answer in outcome.bodies]

    def _load(self, plan: Plan) -> Outcome:
        done = subprocess.run(
            [*self._inside, sys.executable, "-m", "benchmarks.load"],
            input=plan.to_json(),
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=plan.warm_seconds + plan.seconds + 120,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise Unavailable(f"the load failed: {lines[-1] if lines else done.returncode}")
        return Outcome(**json.loads(done.stdout))


class Bound:
    """OpenVINO's throughput mode in a process of its own; concurrency and bodies mean nothing."""

    name = "in-process"

    def __init__(self, child: subprocess.Popen[Any], streams: str) -> None:
        self.about = f"OpenVINO throughput mode without a server, float32, {streams}"
        self._child = child

    def measure(self, body: Body, concurrency: int, seconds: float) -> Outcome | None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{seconds}\n")
        self._child.stdin.flush()
        rates = json.loads(self._child.stdout.readline())
        answered = round(max(rates.values()) * seconds)
        return Outcome(seconds, answered, failed=0, p50=0.0, p99=0.0, client_cpu=0.0)


def start_bound(stack: ExitStack, folder: Path, threads: int) -> Bound:
    """Start the bound on the network in `folder`."""
    process = Process(
        [sys.executable, "-m", "benchmarks.bound", str(folder)],
        folder / "bound.log",
        {"OMP_NUM_THREADS": str(threads)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.stop)
    assert process.child.stdout is not None
    line = process.child.stdout.readline()
    if not line.startswith("ready"):
        process.child.wait(STOP_SECONDS)
        process.check()
    return Bound(process.child, line.removeprefix("ready").strip())


def start_nothing(stack: ExitStack, folder: Path, samples: list[Sample]) -> Server:
    """Start the server that does nothing."""
    process = Process(
        [sys.executable, "-m", "benchmarks.nothing"],
        folder / "nothing.log",
        {},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack.callback(process.stop)
    assert process.child.stdout is not None
    port = int(process.child.stdout.readline().split()[1])
    return Server(
        "nothing", "answers the same bytes to everything", process, port, _requests(samples)
    )


def start_foldserve(
    stack: ExitStack, folder: Path, network: Network, samples: list[Sample], settings: Settings
) -> Server:
    """Start this service, upload the training form, fetch the deploy form for the peers.

    Leaves `network` and `deploy.pth` in `folder`, as the peers' apps expect them.
    """
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0"]
    process = Process(
        [*command, "--data-dir", str(folder / "data")],
        folder / "foldserve.log",
        {"FOLDSERVE_LOG_FORMAT": "json", **settings.environment},
    )
    stack.callback(process.stop)
    port = ready_port(process)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as http:
        checkpoint = io.BytesIO()
        torch.save(network.training_form().state_dict(), checkpoint)
        config = {"input_shape": list(network.shape), **settings.config}
        answer = http.post(
            "/v1/models/model/versions",
            files={"checkpoint": ("train.pth", checkpoint.getvalue())},
            data={"config": json.dumps(config)},
            headers={"Prefer": "wait=240"},
        )
        if answer.status_code != 201:
            raise Unavailable(answer.text)
        deploy = http.get("/v1/models/model/versions/1/checkpoints/deploy?format=pth")
        (folder / "deploy.pth").write_bytes(deploy.raise_for_status().content)
        (folder / "network").write_text(network.name)
        health = http.get("/health").json()
    return Server(promises.OWN, _serving(health), process, port, _requests(samples))


def start_foldserve_apart(
    stack: ExitStack,
    folder: Path,
    network: Network,
    samples: list[Sample],
    settings: Settings,
    processes: int,
) -> Server:
    """Start this service once more, with several HTTP processes and a folder of its own."""
    own = folder / "apart"
    own.mkdir()
    environment = {**settings.environment, "FOLDSERVE_HTTP_PROCESSES": str(processes)}
    server = start_foldserve(stack, own, network, samples, Settings(environment, settings.config))
    server.name = promises.OWN_SEVERAL
    server.about += f", {processes} HTTP processes"
    return server


class Settings:
    """How this service is run: its environment and the config of the upload."""

    def __init__(self, environment: Mapping[str, str], config: Mapping[str, Any]) -> None:
        self.environment, self.config = environment, config


def _requests(samples: list[Sample]) -> dict[Body, tuple[bytes, ...]]:
    path = "/v1/models/model/predict"

    def of(body: Body, sample: Sample) -> bytes:
        if body == "json":
            return json_request(path, {"inputs": sample.nested})
        content = sample.npy if body == "binary" else sample.photo
        kind = NPY if body == "binary" else "image/jpeg"
        return http_request(path, content, content_type=kind, accept=NPY)

    return {body: tuple(of(body, sample) for sample in samples) for body in ("binary", "jpeg")} | {
        "json": tuple(of("json", sample) for sample in samples)
    }


def foldserve_logits(body: Body, answer: bytes) -> Floats:
    """Logits of an npy answer, or the sorted scores' logarithms of a JSON answer."""
    if body == "json":
        top = json.loads(answer)["predictions"][0]["top"]
        return np.log(np.array([each["score"] for each in top], np.float32))
    logits: Floats = np.load(io.BytesIO(answer), allow_pickle=False).reshape(-1)
    return logits


def _serving(health: Any) -> str:
    (model,) = health["models"]
    about = model["forms"]["deploy"]
    return f"{about['backend']} {about['precision']}, {about['layout']}, batches from backlog"


def ready_port(process: Process) -> int:
    """The port in the line that says `ready`. Raises Unavailable when none comes."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        process.check()
        for line in process.log().splitlines():
            if '"event": "ready"' in line:
                return int(json.loads(line)["address"].rpartition(":")[2])
        time.sleep(0.1)
    raise Unavailable(f"not ready after {START_SECONDS} s")


def start_peer(
    stack: ExitStack, peer: Peer, installed: Path, folder: Path, samples: list[Sample], threads: int
) -> Server:
    """Start a peer on the deploy form in `folder` and wait until it answers."""
    found = peer.version(installed)
    port = _free_port()
    command = [str(peer.interpreter(installed)), "-m", f"benchmarks.peer_apps.{peer.app}"]
    command += [str(folder), str(port)]
    if peer.isolated:
        script = 'ip link set lo up && exec "$0" "$@"'
        command = ["unshare", "--net", "sh", "-c", script, *command]
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "PATH": f"{peer.interpreter(installed).parent}:{os.environ['PATH']}",
        "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True",
    }
    process = Process(command, folder / f"{peer.name}.log", environment)
    stack.callback(process.stop)
    inside = ("nsenter", f"--net=/proc/{process.child.pid}/ns/net") if peer.isolated else ()
    requests: dict[Body, tuple[bytes, ...]] = {}
    for body in ("binary", "jpeg", "json"):
        made = [peer.encode(body, sample) for sample in samples]
        if all(made):
            requests[body] = tuple(one for one in made if one)
    server = Server(peer.name, f"{found}: {peer.about}", process, port, requests, inside)
    _wait_answering(server, process)
    return server


def _wait_answering(server: Server, process: Process) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        process.check()
        try:
            server.answers("binary")
        except (Unavailable, OSError) as error:
            if time.monotonic() > deadline:
                raise Unavailable(f"not answering after {START_SECONDS} s: {error}") from None
            time.sleep(0.5)
        else:
            return


def _free_port() -> int:
    """A port with two free neighbours behind it, for servers that want more than one."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for offset in (1, 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port
