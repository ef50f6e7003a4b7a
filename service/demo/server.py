"""The service as the demo runs it: a process of its own on a free loopback port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from service.demo.failure import DemoFailed

READY_SECONDS = 90.0
STOP_SECONDS = 40.0

# The demo must not write into the store that the user's environment names; these it may follow.
_KEPT_VARIABLES = frozenset({"FOLDSERVE_DEVICE", "FOLDSERVE_TORCH_THREADS"})


class Service:
    """`foldserve serve` with its data in `data_dir` and its log in `data_dir`/service.log.

    A context manager: leaving it ends the process, unless `keep` was called.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log = data_dir / "service.log"
        self.url = ""
        self._kept = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        command = [sys.executable, "-m", "service.cli", "serve", "--host", "127.0.0.1"]
        command += ["--port", "0", "--data-dir", str(self.data_dir)]
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C at the terminal is for the demo, which then ends this.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )
        try:
            self._await_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self._stop()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def keep(self) -> None:
        """Leave the process running."""
        self._kept = True

    def _await_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise DemoFailed(f"The service ended with status {status}.\n{self._last_lines()}")
            self.url = self.url or self._address()
            if self.url and httpx.get(f"{self.url}/health/ready", timeout=30).is_success:
                return
            time.sleep(0.1)
        raise DemoFailed(f"The service was not ready in {READY_SECONDS:g} s.\n{self._last_lines()}")

    def _address(self) -> str:
        """The address in the log line that says `ready`; empty before there is one."""
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("event") == "ready":
                return str(entry["address"])
        return ""

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def _stop(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment() -> dict[str, str]:
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FOLDSERVE_") or name in _KEPT_VARIABLES
    }
    # The service shares the cores with whatever else runs here: threads that wait must not spin.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | own | {"FOLDSERVE_LOG_FORMAT": "json"}
