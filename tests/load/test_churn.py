"""Loading and unloading for ever leaves nothing behind."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import httpx
import pytest

from tests.api.raw import connected
from tests.promises import Tell
from tests.running import RunningServer

MIB = 2**20


@dataclass(frozen=True)
class Trace:
    """Bytes of memory after every cycle; descriptors and threads before and after them all."""

    memory: list[float]
    descriptors: tuple[int, int]
    threads: tuple[int, int]

    @property
    def slope(self) -> float:
        """Bytes a cycle, by least squares."""
        return statistics.linear_regression(range(len(self.memory)), self.memory).slope


def left_behind(trace: Trace, slope: float) -> list[str]:
    """What the cycles left: more than `slope` bytes each, or any descriptor or thread.

    Fewer are no fault: a pool lets a thread go that had nothing to do.
    """
    faults = []
    if trace.slope > slope:
        faults.append(f"{trace.slope / MIB:.3f} MiB a cycle")
    if trace.descriptors[1] > trace.descriptors[0]:
        faults.append(f"descriptors {trace.descriptors}")
    if trace.threads[1] > trace.threads[0]:
        faults.append(f"threads {trace.threads}")
    return faults


def cycle(server: RunningServer, count: int, meanwhile: Callable[[], object] = int) -> Trace:
    """Unload and load a model `count` times, after as many again as make things settle."""
    with httpx.Client(base_url=server.url, timeout=60) as http:

        def once() -> float:
            for verb in ("unload", "load"):
                answer = http.post(f"/v2/repository/models/lookup/{verb}")
                assert answer.status_code == 200, answer.text
            return server.resident_bytes()

        for _ in range(min(40, max(5, count // 4))):
            once()
        before = server.descriptors(), server.threads()
        memory = []
        for _ in range(count):
            meanwhile()
            memory.append(once())
        after = server.descriptors(), server.threads()
    return Trace(memory, (before[0], after[0]), (before[1], after[1]))


def test_loading_and_unloading_leaves_nothing(loaded: RunningServer) -> None:
    """A leak is there in every round; a pool that comes to its size is not."""
    for _ in range(4):
        if not (faults := left_behind(cycle(loaded, 40), 0.5 * MIB)):
            break
    assert faults == []


def test_what_is_left_behind_is_seen(loaded: RunningServer) -> None:
    """The control: every cycle somebody opens a connection and keeps it."""
    with contextlib.ExitStack() as stack:
        trace = cycle(loaded, 5, lambda: stack.enter_context(connected(loaded.url)))
    assert any(fault.startswith("descriptors") for fault in left_behind(trace, MIB))
    leaking = Trace([n * 0.2 * MIB for n in range(50)], (7, 7), (3, 4))
    assert left_behind(leaking, 0.1 * MIB) == ["0.200 MiB a cycle", "threads (3, 4)"]


@pytest.mark.soak(share=0.05)
def test_five_hundred_cycles_leave_nothing(loaded: RunningServer, tell: Tell) -> None:
    trace = cycle(loaded, 500)
    if left_behind(trace, 0.1e6):  # a leak is there once more, a pool has come to its size
        trace = cycle(loaded, 500)
    tell(
        "500 load and unload cycles", "<= 0.1 MB a cycle, descriptors and threads +-0",
        f"{trace.slope / 1e6:+.4f} MB a cycle, {trace.descriptors}, {trace.threads}",
        "a connection kept every cycle is seen",
    )  # fmt: skip
    assert left_behind(trace, 0.1e6) == []
