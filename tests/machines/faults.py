"""What goes wrong on a machine, and when: the control block that `shim.c` reads there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

_IDLE, _COUNT, _KILL, _FAIL_ONE, _FAIL_FROM, _KILL_AFTER = range(6)


class _Control(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("mode", "at", "error", "leader", "seen", "struck", "no_sync")
    ]


class Faults:
    """What happens at the n-th change (counted from 1) that any process makes on the disk."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(ctypes.sizeof(_Control)))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), 0)
        self._control = _Control.from_buffer(self._map)
        self._orders = 0

    def off(self) -> None:
        """Nothing happens, nothing is counted."""
        self._orders += 1
        self._control.mode = _IDLE

    def count(self) -> None:
        """Count changes from now on."""
        self._set(_COUNT, 0)

    def kill(self, leader: int, at: int, *, after: bool = False) -> None:
        """SIGKILL the process `leader` just before, or after, change `at`."""
        watched = os.pidfd_open(leader)
        self._set(_KILL_AFTER if after else _KILL, at, leader=leader)
        threading.Thread(target=self._execute, args=(watched, self._orders), daemon=True).start()

    def _execute(self, leader: int, order: int) -> None:
        """Kill for a sandboxed child, which comes to the change, stops, and may send no signal."""
        try:
            while order == self._orders and not self.struck:
                time.sleep(0.002)
            if order == self._orders:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(leader, signal.SIGKILL)
        finally:
            os.close(leader)

    def fail(self, at: int, error: int = errno.ENOSPC, *, lasting: bool = False) -> None:
        """Let change `at`, and all that follow if `lasting`, fail with `error`."""
        self._set(_FAIL_FROM if lasting else _FAIL_ONE, at, error=error)

    def forget_syncs(self, wanted: bool) -> None:
        """Let fsync do nothing: what a store without it would do."""
        self._control.no_sync = int(wanted)

    @property
    def seen(self) -> int:
        """Changes since the last order."""
        return int(self._control.seen)

    @property
    def struck(self) -> int:
        """How often the fault was played since the last order."""
        return int(self._control.struck)

    def _set(self, mode: int, at: int, *, error: int = 0, leader: int = 0) -> None:
        self.off()
        self._control.at, self._control.error, self._control.leader = at, error, leader
        self._control.seen = self._control.struck = 0
        self._control.mode = mode
