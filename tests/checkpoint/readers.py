"""Driving a warm, confined reader (`reader_child`) from a test."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.running import ROOT

SECONDS = 10.0
"""CPU time that reading one file may take."""
_WALL_SECONDS = 120.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How reading a file went: the code, CPU seconds, and memory added at the peak, bytes."""

    code: str
    seconds: float
    bytes: int

    def faults(self, file_bytes: int) -> list[str]:
        """What was wrong with it, if anything: crashes, and limits of time and memory."""
        found = []
        if self.code.startswith("crash"):
            found.append(self.code)
        if self.seconds > SECONDS:
            found.append(f"{self.seconds:.1f} s")
        if self.bytes > 2 * file_bytes + 256 * _MIB:
            found.append(f"{self.bytes} bytes of memory for a file of {file_bytes}")
        return found


class Reader:
    """One reader process. It is started again when it dies, which is an outcome too."""

    def __init__(self, folder: Path, wall_seconds: float = _WALL_SECONDS) -> None:
        self._folder, self._wall_seconds = folder, wall_seconds
        self._process: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> Outcome:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        started = time.monotonic()
        if not select.select([process.stdout], [], [], self._wall_seconds)[0]:
            self._end()
            return Outcome("crash: no answer", time.monotonic() - started, 0)
        line = process.stdout.readline()
        if not line:
            code = process.wait()
            self._end()
            return Outcome(f"crash: the reader ended with {code}", 0.0, 0)
        return Outcome(**json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.checkpoint.reader_child", str(self._folder)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._end()


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below `folder`: mode, size and time of its last change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        found[str(path)] = (facts.st_mode, facts.st_size, facts.st_mtime_ns)
    return found
