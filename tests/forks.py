"""Commands forked from a process that has imported everything: see `stable`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Fork:
    """A process that is not our child, used as `subprocess.Popen` is."""

    def __init__(self, pid: int, status_file: Path) -> None:
        self.pid = pid
        self._status_file = status_file
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = -1
        self._killed_by = signal.SIGKILL

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def poll(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._status() if self._gone(0) else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it is gone; TimeoutExpired if it is not."""
        if not self._gone(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return self._status()

    def send_signal(self, number: int) -> None:
        """Nothing happens to a process that is gone."""
        if self._descriptor >= 0:
            self._killed_by = signal.Signals(number)
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _gone(self, timeout: float | None) -> bool:
        if self._descriptor < 0:
            return True
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLIN)
        return bool(waiting.poll(None if timeout is None else timeout * 1000))

    def _status(self) -> int:
        if self._status_file.exists():
            return int(self._status_file.read_text())
        return -self._killed_by


class Stable:
    """The process that commands are forked from, at whoever's order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = threading.Lock()

    def fork(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        out: Path | None = None,
        change: str = "",
    ) -> Fork:
        """Start `foldserve` with these arguments in this environment."""
        status = log.with_suffix(".status")
        status.unlink(missing_ok=True)
        order = {
            "arguments": [*arguments],
            "environment": {**environment},
            "out": str(out or os.devnull),
            "log": str(log),
            "status": str(status),
            "change": change,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return Fork(int(self._process.stdout.readline()), status)


@contextmanager
def stable(environment: Mapping[str, str]) -> Iterator[Stable]:
    """All that was forked from it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stable"],
        cwd=ROOT,
        env={**environment, "OPENBLAS_NUM_THREADS": "1"},  # a fork takes no threads along
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "warm\n"
        yield Stable(process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
