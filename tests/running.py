"""A real service in a process of its own, as tests use it."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from tests.forks import ROOT, Fork, Stable, stable

Process = subprocess.Popen[bytes] | Fork
START_SECONDS = 240
STOP_SECONDS = 40
_COLUMNS = "200"


@dataclass(frozen=True)
class RunningServer:
    """Where the service answers, its process, its store, and what it has logged so far."""

    url: str
    process: Process
    data_dir: Path
    log_file: Path

    def log(self) -> list[dict[str, str]]:
        """The JSON log lines written so far."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines() if line]

    def resident_bytes(self) -> int:
        """Memory of the process that is in RAM and its own (anonymous pages), in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(line.split()[1]) * 1024

    def descriptors(self) -> int:
        """How many files and sockets the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def opened(self, name: str) -> int:
        """How often it has a file of that name open."""
        found = 0
        for number in os.listdir(f"/proc/{self.process.pid}/fd"):
            with suppress(OSError):
                found += os.readlink(f"/proc/{self.process.pid}/fd/{number}").endswith(f"/{name}")
        return found

    def threads(self) -> int:
        """How many threads the process has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def stop(self) -> int:
        """Send SIGTERM and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


def eventually(holds: Callable[[], bool], what: str, seconds: float = 60) -> float:
    """Wait until it holds; how long that took, in seconds."""
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, what
        time.sleep(0.02)
    return time.monotonic() - begun


@contextmanager
def running(
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *arguments: str,
    fresh: bool = False,
    module: str = "service.cli",
) -> Iterator[RunningServer]:
    """`foldserve serve` on a free port with its data in `folder`, ready when this returns.

    It is the fork of a process that has imported everything, for importing takes most of a start;
    `fresh`, it is a process from the beginning, as users have it; `module` is what that runs.
    """
    own = _environment()
    # Not the default priority: on a machine that others keep busy, an idle process never runs. Not
    # the default backend either: one that needs no measuring is there in a moment.
    own |= {"FOLDSERVE_LOG_FORMAT": "json", "FOLDSERVE_CONVERSION_PRIORITY": "normal"}
    own |= {"FOLDSERVE_BACKEND": "torch"} | dict(environment or {})
    log_file = folder.parent / f"{folder.name}.log"
    serve = ["serve", "--port", "0", "--data-dir", str(folder), *arguments]
    log_file.write_bytes(b"")
    process: Process
    if fresh or sys.platform != "linux":
        process = _started(module, serve, own, log_file)
    else:
        process = _stable().fork(serve, own, log_file)
    try:
        url = _address(process, log_file)
        _wait_ready(process, url, log_file)
        yield RunningServer(url, process, folder, log_file)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def foldserve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command: what it prints, and its exit status. It is a fork, as a service is."""
    own = _environment() | {"COLUMNS": _COLUMNS} | environment
    if sys.platform != "linux":
        line = [sys.executable, "-m", "service.cli", *arguments]
        return subprocess.run(line, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)
    with TemporaryDirectory() as folder:
        out, log = Path(folder, "out"), Path(folder, "log")
        status = _stable().fork(arguments, own, log, out=out).wait(120)
        return subprocess.CompletedProcess(arguments, status, out.read_text(), log.read_text())


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("FOLDSERVE_")}


def _started(
    module: str, arguments: list[str], environment: Mapping[str, str], log_file: Path
) -> Process:
    command = [sys.executable, "-m", module, *arguments]
    with log_file.open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=dict(environment), stderr=log)


@cache
def _stable() -> Stable:
    """One for all tests of this process."""
    life = ExitStack()
    atexit.register(life.close)
    return life.enter_context(stable(_environment() | {"COLUMNS": _COLUMNS}))


def _address(process: Process, log_file: Path) -> str:
    """The address in the line that says `ready`."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for line in log_file.read_text().splitlines():
            if '"event": "ready"' in line:
                address: str = json.loads(line)["address"]
                return address
        time.sleep(0.05)
    raise AssertionError(f"the service did not start:\n{log_file.read_text()}")


def _wait_ready(process: Process, url: str, log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if httpx.get(f"{url}/health/ready").status_code == 200:
            return
        time.sleep(0.05)
    raise AssertionError(f"the service is not ready:\n{log_file.read_text()}")
