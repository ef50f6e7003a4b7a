"""Looking at processes from outside: who descends from whom, and what each holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def children(pid: int) -> list[int]:
    """The processes that were forked by any thread of `pid`."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children(waiting.pop())
        found += below
        waiting += below
    return found


def conversion(service: int) -> int | None:
    """The child that converts: a child of the service's fork server. None when there is none."""
    for helper in children(service):
        for child in children(helper):
            return child
    return None


@dataclass(frozen=True)
class Held:
    """What a process holds: open descriptors, threads, descendants, anonymous memory in bytes."""

    descriptors: int
    threads: int
    processes: int
    memory: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return cls(
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=len(os.listdir(f"/proc/{pid}/task")),
            processes=len(descendants(pid)),
            memory=int(line.split()[1]) * 1024,
        )
