"""A machine whose power and disk a test controls: services on it die and fail when they are told.

`Faults` is the control block that `shim.c` reads in every process of the machine. `Machine` boots
services (see `stable`), kills them, and can play a power cut, after which only what was synced is
left.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.running import ROOT, START_SECONDS

_QUICK = {
    "FOLDSERVE_LOG_FORMAT": "json",
    "FOLDSERVE_MAX_BATCH": "1",
    "FOLDSERVE_TORCH_THREADS": "1",
    "FOLDSERVE_CONVERSION_POLL_SECONDS": "0.05",
    "FOLDSERVE_CONVERSION_PRIORITY": "normal",  # an idle one never ends where others are busy
}
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


@dataclass(frozen=True)
class Booted:
    """One life of a service."""

    pid: int
    url: str
    data_dir: Path
    log_file: Path

    def client(self) -> httpx.Client:
        # Without TLS nothing is verified, and the certificates need not be loaded for every life.
        return httpx.Client(base_url=self.url, timeout=60, verify=False)

    def wait_ready(self) -> None:
        """Until readiness answers 200."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if httpx.get(f"{self.url}/health/ready").status_code == 200:
                return
            time.sleep(0.01)
        raise AssertionError(f"not ready:\n{self.log_file.read_text()}")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        end(self.pid, signal.SIGKILL)

    def wait_gone(self) -> None:
        """Until it has died by itself."""
        end(self.pid, 0)


def end(pid: int, number: int, seconds: float = 40) -> None:
    """Send a signal (0: none) to a process that is not our child, and wait for its end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
        gone, _, _ = select.select([descriptor], [], [], seconds)
        assert gone, f"process {pid} did not end"
    finally:
        os.close(descriptor)


class Machine:
    """Boots services over folders below `folder`; make it with `machine`."""

    def __init__(self, folder: Path, stable: subprocess.Popen[str], faults: Faults) -> None:
        self.folder, self.faults = folder, faults
        self.disk, self.shadow = folder / "disk", folder / "shadow"
        self._stable = stable
        self._boots = 0

    def boot(
        self, data_dir: Path, environment: Mapping[str, str] | None = None, change: str = ""
    ) -> Booted:
        """A service that listens; its defaults may still be loading."""
        self._boots += 1
        log = self.folder / f"boot-{self._boots}.log"
        order = {
            "data_dir": str(data_dir),
            "log": str(log),
            "environment": _QUICK | dict(environment or {}),
            "change": change,
        }
        assert self._stable.stdin is not None
        assert self._stable.stdout is not None
        self._stable.stdin.write(json.dumps(order) + "\n")
        self._stable.stdin.flush()
        pid = int(self._stable.stdout.readline())
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
            for line in log.read_text().splitlines() if log.exists() else ():
                if '"event": "ready"' in line:
                    return Booted(pid, json.loads(line)["address"], data_dir, log)
            time.sleep(0.005)
        raise AssertionError(f"the service did not start:\n{log.read_text()}")

    def sync(self, data_dir: Path) -> None:
        """Make all that `data_dir` holds durable, as `sync` and a quiet minute do."""
        for path in (data_dir.parent, data_dir, *data_dir.rglob("*")):
            inode = path.stat().st_ino
            if path.is_dir():
                listing = "".join(_line(entry) for entry in os.scandir(path))
                (self.shadow / f"{inode}.d").write_text(listing)
            else:
                shutil.copyfile(path, self.shadow / f"{inode}.f")

    def cut_power(self, data_dir: Path, restored: Path) -> None:
        """Rebuild in `restored` what a disk holds that kept nothing but what was synced."""
        names = self._listing(data_dir.parent.stat().st_ino)
        assert data_dir.name in names, "even the data folder is lost"
        self._rebuild(data_dir.stat().st_ino, restored)

    def _rebuild(self, inode: int, target: Path) -> None:
        target.mkdir()
        for name, (number, kind) in self._listing(inode).items():
            if kind == "d":
                self._rebuild(number, target / name)
                continue
            copy = self.shadow / f"{number}.f"
            (target / name).write_bytes(copy.read_bytes() if copy.exists() else b"")

    def _listing(self, inode: int) -> dict[str, tuple[int, str]]:
        copy = self.shadow / f"{inode}.d"
        lines = copy.read_text().splitlines() if copy.exists() else []
        parts = [line.split(" ", 2) for line in lines]
        return {name: (int(number), kind) for number, kind, name in parts}


def _line(entry: os.DirEntry[str]) -> str:
    return f"{entry.inode()} {'d' if entry.is_dir() else 'f'} {entry.name}\n"


def compiler() -> str | None:
    """A C compiler, which these tests need for their shim."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@contextmanager
def machine(folder: Path) -> Iterator[Machine]:
    """A machine with an empty disk; everything on it is killed at the end."""
    cc = compiler()
    assert cc is not None
    shim = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(
        [cc, "-O1", "-shared", "-fPIC", "-o", str(shim), str(source), "-ldl", "-lpthread"],
        check=True,
    )
    for name in ("disk", "shadow"):
        (folder / name).mkdir()
    faults = Faults(folder / "control")
    own = {k: v for k, v in os.environ.items() if not k.startswith("FOLDSERVE_")}
    own |= {
        "LD_PRELOAD": str(shim),
        "FAULTS_CONTROL": str(folder / "control"),
        "FAULTS_FOLDER": str(folder / "disk"),
        "FAULTS_SHADOW": str(folder / "shadow"),
        "OMP_NUM_THREADS": "1",
    }
    stable = subprocess.Popen(
        [sys.executable, "-m", "tests.machines.stable"],
        cwd=ROOT,
        env=own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert stable.stdout is not None
        assert stable.stdout.readline() == "warm\n"
        yield Machine(folder, stable, faults)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(stable.pid, signal.SIGKILL)
        stable.communicate()
