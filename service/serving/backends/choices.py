"""What was measured to be fastest, remembered by what it depends on, across restarts if told where.

A choice holds for one program structure on one machine with one set of library versions and one
number of threads; its key is made of all of them, so that none of them can change unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from service.graph import Program
from service.serving.backends.choose import fastest
from service.serving.backends.machine import cpu_name

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")

REMEMBERED = 1024
"""Most choices that are kept; the oldest are forgotten, and measured again when they are needed."""

BUDGET_SECONDS = 2.0
"""About how long one choice is measured, in seconds of the candidates' own running time."""


@dataclass(frozen=True)
class Choice:
    """`name` was chosen; `relative` is each candidate's latency over that of the default."""

    name: str
    relative: Mapping[str, float]


class Choices:
    """Remembered choices, in a JSON file if there is a `path`; used from any thread.

    A file that cannot be read or written costs measuring again and is logged, nothing more.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, Choice] = {} if path is None else _read(path)

    def get(self, key: str) -> Choice | None:
        """What was chosen under `key`."""
        with self._lock:
            return self._known.get(key)

    def put(self, key: str, choice: Choice) -> None:
        """Remember a choice."""
        with self._lock:
            self._known.pop(key, None)
            self._known[key] = choice
            while len(self._known) > REMEMBERED:
                del self._known[next(iter(self._known))]
            if self._path is not None:
                _write(self._path, self._known)

    def choose(
        self,
        key: str,
        candidates: Mapping[str, Callable[[Batch], object]],
        batches: Sequence[Batch],
        margin: float = 0.02,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Generator[None, None, Choice]:
        """The choice under `key`, measured with `fastest` unless it is known."""
        known = self.get(key)
        if known is not None and known.name in candidates:
            return known
        name, relative = yield from fastest(
            candidates, batches, margin=margin, budget_seconds=BUDGET_SECONDS, clock=clock
        )
        choice = Choice(name, {other: round(value, 4) for other, value in relative.items()})
        self.put(key, choice)
        return choice


def choice_key(question: str, program: Program, threads: int, *facts: object) -> str:
    """The key of a question about `program` on this machine with `threads` CPU threads."""
    told = (question, structure(program), threads, *_machine(), *facts)
    return f"{question} {hashlib.sha256(repr(told).encode()).hexdigest()}"


def structure(program: Program) -> str:
    """A digest of everything about a program that its speed depends on: all but the weights."""
    digest = hashlib.sha256(repr(program.inputs).encode())
    for node in program.nodes:
        digest.update(repr((node.op, dict(node.args), node.shape, node.dtype)).encode())
    for name, tensor in program.weights.items():
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype)).encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _machine() -> tuple[str, ...]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return (cpu_name(), str(os.cpu_count()), device, str(torch.__version__), _version("openvino"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _read(path: Path) -> dict[str, Choice]:
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return {
            str(key): Choice(
                str(item["name"]), {str(n): float(r) for n, r in item["relative"].items()}
            )
            for key, item in data.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("the remembered choices in %s cannot be read: %s", path, error)
        return {}


def _choice(item: Any) -> Choice:
    relative = {str(name): float(share) for name, share in item["relative"].items()}
    return Choice(str(item["name"]), relative)


def _write(path: Path, known: Mapping[str, Choice]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({key: asdict(choice) for key, choice in known.items()}))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("a choice cannot be remembered in %s: %s", path, error)
        with contextlib.suppress(OSError):
            temporary.unlink()
