"""Functions that run in the sandboxed child: well-behaved, clumsy and hostile ones.

Each takes `progress` as its last argument, as `run_sandboxed` calls it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from service.errors import MixedForm

Progress = Callable[[dict[str, Any]], None]


def add(a: int, b: int, progress: Progress) -> dict[str, Any]:
    for done in range(3):
        progress({"stage": "adding", "done": done})
    return {"sum": a + b, "pid": os.getpid()}


def refuse(progress: Progress) -> None:
    raise MixedForm("Half is converted.", remedy="Convert all of it.", keys=["a.b", "c.d"])


def refuse_oddly(progress: Progress) -> None:
    raise MixedForm("Half is converted.", keys={1, 2})


def divide(progress: Progress) -> float:
    return 1 / 0


def give_a_tensor(progress: Progress) -> object:
    return torch.ones(1)


def give_nan(progress: Progress) -> float:
    return float("nan")


def look_at(paths: list[str], progress: Progress) -> list[str]:
    """The text of each file, or why there is none."""
    found = []
    for path in map(Path, paths):
        try:
            found.append(str(os.listdir(path)) if path.is_dir() else path.read_text())
        except OSError as error:
            found.append(type(error).__name__)
    return found


def read_here(name: str, progress: Progress) -> str:
    return Path(name).read_text()


def die(number: int, progress: Progress) -> None:
    progress({"stage": "dying"})
    os.abort() if number == signal.SIGABRT else signal.raise_signal(number)
    time.sleep(60)


def segfault(progress: Progress) -> None:
    ctypes.string_at(0)


def leave(code: int, progress: Progress) -> None:
    os._exit(code)


def sleep(progress: Progress) -> None:
    progress({"pid": os.getpid()})
    time.sleep(60)


def spin(progress: Progress) -> None:
    while True:
        pass


def allocate_bytes(size: int, progress: Progress) -> int:
    return len(bytearray(size))


def allocate_tensor(size: int, progress: Progress) -> int:
    return int(torch.ones(size, dtype=torch.uint8)[-1]) * size


def share_memory(size: int, progress: Progress) -> None:
    """Memory that no limit of the child's own counts."""
    import mmap

    shared = mmap.mmap(-1, size)
    for start in range(0, size, 1 << 20):
        shared[start : start + (1 << 20)] = b"x" * (1 << 20)
    time.sleep(60)


def flood(progress: Progress) -> None:
    while True:
        os.write(_pipe(), b"{}{}{}{}" * 1000)


def chatter(progress: Progress) -> None:
    while True:
        progress({})


def say(text: bytes, progress: Progress) -> None:
    os.write(_pipe(), text)
    time.sleep(60)


def _pipe() -> int:
    """The descriptor of the pipe to the parent: the only one beside the standard three."""
    (pipe,) = [fd for fd in range(3, 256) if Path(f"/proc/self/fd/{fd}").exists()]
    return pipe


def state(progress: Progress) -> dict[str, Any]:
    """What the child finds itself with."""
    return {
        "descriptors": sorted(
            int(name)
            for name in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{name}")
        ),
        "temporary": tempfile.gettempdir(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "policy": os.sched_getscheduler(0),
        "environment": Path("/proc/self/environ").read_text().split("\0"),
        "threads": torch.get_num_threads(),
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "modules": sorted(set(sys.modules) & {"fastapi", "pydantic", "sqlalchemy", "pytest"}),
        "status": {
            key: value.strip()
            for key, _, value in (
                line.partition(":") for line in Path("/proc/self/status").read_text().splitlines()
            )
            if key in ("NoNewPrivs", "CapEff", "CapPrm", "Seccomp")
        },
    }


def _tried(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"


def attack(outside: str, victim: int, progress: Progress) -> dict[str, str]:
    """What a child under an attacker's control gets done."""
    os.chdir(tempfile.gettempdir())
    there = Path(outside)
    inside = Path("inside")
    return {
        "write inside": _tried(lambda: inside.write_text("x")),
        "delete inside": _tried(inside.unlink),
        "make a folder inside": _tried(lambda: Path("folder").mkdir()),
        "write outside": _tried(lambda: (there / "new").write_text("x")),
        "overwrite outside": _tried(lambda: (there / "old").write_text("x")),
        "truncate outside": _tried(lambda: os.truncate(there / "old", 0)),
        "delete outside": _tried(lambda: (there / "old").unlink()),
        "make a folder outside": _tried(lambda: (there / "folder").mkdir()),
        "rename outside": _tried(lambda: (there / "old").rename(there / "moved")),
        "link from outside": _tried(lambda: os.link(there / "old", "linked")),
        "symbolic link": _tried(lambda: os.symlink(there / "old", "symbolic")),
        "pipe": _tried(lambda: os.mkfifo("pipe")),
        "chmod outside": _tried(lambda: (there / "old").chmod(0o777)),
        "tcp": _tried(lambda: socket.socket(socket.AF_INET).close()),
        "unix": _tried(lambda: socket.socket(socket.AF_UNIX).close()),
        "run a program": _tried(lambda: subprocess.run(["/bin/true"], check=False)),
        "fork": _tried(_fork),
        "kill the service": _tried(lambda: os.kill(victim, 0)),
        "change its limits": _tried(
            lambda: resource.prlimit(victim, resource.RLIMIT_CPU, (1 << 40, 1 << 40))
        ),
        "raise own limits": _tried(lambda: _raise_limit()),
    }


def reach(victim: int, progress: Progress) -> dict[str, str]:
    """What a child gets done to the service's process, and by the kernel's rarer ways out."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: Any) -> None:
        if libc.syscall(ctypes.c_long(number), *arguments) < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def signal_by_descriptor() -> None:
        reader, writer = os.pipe()
        try:
            fcntl.fcntl(reader, fcntl.F_SETOWN, victim)
            fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC)
            os.write(writer, b"x")
        finally:
            os.close(reader)
            os.close(writer)

    def memory() -> None:
        os.close(os.open(f"/proc/{victim}/mem", os.O_RDWR))

    here = os.sched_getscheduler(0), os.sched_param(0)
    return {
        "environment": _tried(Path(f"/proc/{victim}/environ").read_bytes),
        "memory": _tried(memory),
        "memory map": _tried(Path(f"/proc/{victim}/maps").read_bytes),
        "descriptors": _tried(lambda: os.listdir(f"/proc/{victim}/fd")),
        "signal": _tried(lambda: os.kill(victim, signal.SIGURG)),
        "signal by descriptor": _tried(signal_by_descriptor),
        "read its memory": _tried(lambda: call(310, victim, None, 0, None, 0, 0)),
        "ptrace": _tried(lambda: call(101, 0x4206, victim, None, None)),  # PTRACE_SEIZE
        "slow it down": _tried(lambda: os.setpriority(os.PRIO_PROCESS, victim, 1)),
        "change its policy": _tried(lambda: os.sched_setscheduler(victim, *here)),
        "move it": _tried(lambda: os.sched_setaffinity(victim, os.sched_getaffinity(victim))),
        "descriptor of it": _tried(lambda: os.close(os.pidfd_open(victim))),
        "memory file": _tried(lambda: os.close(os.memfd_create("x"))),
        "shared memory": _tried(lambda: call(29, 0x7F0157, 4096, 0o1600)),
        "io_uring": _tried(lambda: call(425, 0, None)),
        "namespace": _tried(lambda: call(272, 0x10000000)),  # CLONE_NEWUSER
        "many descriptors": _tried(_open_many),
        "raw disk": _tried(_raw_disk),
    }


def _open_many() -> None:
    opened = []
    try:
        for _ in range(1000):
            opened.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for descriptor in opened:
            os.close(descriptor)


def _raw_disk() -> None:
    """Any device file but the four that are granted; making one takes powers that are gone."""
    os.close(os.open("/dev/tty" if not Path("/dev/full").exists() else "/dev/full", os.O_RDONLY))


def fill_with_bytes(progress: Progress) -> None:
    for number in range(64):
        Path(tempfile.gettempdir(), str(number)).write_bytes(b"x" * (4 << 20))
    time.sleep(60)


def fill_with_files(progress: Progress) -> None:
    for number in range(2_000):
        Path(tempfile.gettempdir(), str(number)).touch()
    time.sleep(60)


def burn(seconds: float, progress: Progress) -> dict[str, float]:
    """Compute for a while; how much of the time it had the processor."""
    begun, had = time.monotonic(), time.process_time()
    while time.process_time() - had < seconds:
        pass
    return {"share": seconds / (time.monotonic() - begun)}


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _raise_limit() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (1 << 40, 1 << 40))
    except ValueError as error:
        raise PermissionError from error


def write_much(progress: Progress) -> str:
    os.chdir(tempfile.gettempdir())

    def write() -> None:
        with open("large", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))

    return _tried(write)


def export_and_train(progress: Progress) -> dict[str, Any]:
    """That the confinement leaves everything possible that a conversion does."""
    os.chdir(tempfile.gettempdir())
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    net.eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    image = torch.randn(2, 3, 64, 64)
    program = torch.export.export(net, (image,), dynamic_shapes=({0: batch},))
    torch.save(net.state_dict(), "weights.pth")
    same = torch.allclose(program.module()(image), net(image))
    return {"same": same, "bytes": os.path.getsize("weights.pth")}
