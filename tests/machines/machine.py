"""A machine whose power and disk a test controls: services on it die and fail when they are told.

`Machine` boots services (see `stable`), kills them, and can play a power cut, after which only what
was synced is left. Machines side by side share one `Stable` and nothing else.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.forks import Stable, stable
from tests.machines.faults import Faults
from tests.running import START_SECONDS

_QUICK = {
    "FOLDSERVE_LOG_FORMAT": "json",
    "FOLDSERVE_BACKEND": "torch",  # it needs no preparing, and what is tested here is the disk
    "FOLDSERVE_MAX_BATCH": "1",
    "FOLDSERVE_TORCH_THREADS": "1",
    "FOLDSERVE_CONVERSION_POLL_SECONDS": "0.05",
    "FOLDSERVE_CONVERSION_PRIORITY": "normal",  # an idle one never ends where others are busy
}


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
    """Boots services over folders below `disk`; make it with `machine`."""

    def __init__(self, folder: Path, stable: Stable, environment: dict[str, str]) -> None:
        self.folder = folder
        self.disk, self.shadow = folder / "disk", folder / "shadow"
        for made in (self.disk, self.shadow):
            made.mkdir(parents=True)
        self.faults = Faults(folder / "control")
        self._stable, self._environment = stable, environment
        self._boots = 0
        self._durable: dict[Path, tuple[int, int, int]] = {}

    def beside(self, name: str) -> Machine:
        """Another machine with an empty disk, on which other things happen at the same time."""
        return Machine(self.folder / name, self._stable, self._environment)

    def boot(
        self, data_dir: Path, environment: Mapping[str, str] | None = None, change: str = ""
    ) -> Booted:
        """A service that listens; its defaults may still be loading."""
        self._boots += 1
        log = self.folder / f"boot-{self._boots}.log"
        faults = {"CONTROL": "control", "FOLDER": "disk", "SHADOW": "shadow"}
        own = self._environment | _QUICK | dict(environment or {})
        own |= {f"FAULTS_{key}": str(self.folder / name) for key, name in faults.items()}
        serve = ["serve", "--port", "0", "--data-dir", str(data_dir)]
        pid = self._stable.fork(serve, own, log, change=change).pid
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
            found = path.stat()
            state = (found.st_ino, found.st_mtime_ns, found.st_size)
            copy = self.shadow / f"{found.st_ino}.{'d' if path.is_dir() else 'f'}"
            if self._durable.get(copy) == state and copy.exists():
                continue
            if path.is_dir():
                copy.write_text("".join(_line(entry) for entry in os.scandir(path)))
            else:
                shutil.copyfile(path, copy)
            self._durable[copy] = state

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
    own = {k: v for k, v in os.environ.items() if not k.startswith("FOLDSERVE_")}
    own |= {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"}
    with stable(own) as forks:
        yield Machine(folder / "machine", forks, own)
