"""One device: whatever computes there comes through here, in the order in which it was posted.

A job has the device to itself, so that two models never fight over the same cores and a backend
needs no lock. A CPU can be shared out too: a job that says so runs *beside* others of its kind, one
CPU thread each, as many at once as there are threads. That is worth as much as a better engine: no
core waits for the others inside a network, and while one answers, the others compute.

Threads are plain ones, each fed by a `queue.SimpleQueue`: 52 microseconds there and back against 58
by `loop.run_in_executor` (uvloop: 48 against 55). On a busy machine such a hop waits for the
scheduler too and takes several times as long as a small network, and the two threads contend for
the interpreter: `run_if_idle` is for work that is not worth it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from service.errors import DeviceLost, ModelFaulty, NotLoaded
from service.serving.backends import find_lost

T = TypeVar("T")
Job = Callable[[], object]
log = logging.getLogger(__name__)

_ANEW_SECONDS = 10.0
"""About what the service takes to start itself anew."""


def available_cpus() -> int:
    """CPUs this process may really use: its affinity, and the control group's quota if any."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, round(int(quota) / int(period))))


class Device:
    """Runs jobs for one device (`cpu`, `cuda:0`) in the order in which they were posted.

    Jobs that have it to themselves all run on one thread, `device <name>`, whose number of CPU
    threads is `threads`. The threads for jobs beside others are made when they are first needed.
    """

    def __init__(self, device: str = "cpu", threads: int = 0) -> None:
        """`threads` bounds the CPU threads of all that runs; 0 means every CPU that is there."""
        self.device = device
        self.threads = threads or available_cpus()
        self.lost: DeviceLost | None = None
        """Why nothing can be computed here until the process is another one; see `ask`."""
        self._kept: list[object] = []
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Job, bool]] = deque()
        self._running = 0
        self._whole = False
        self._closed = False
        self._first = _Lane(f"device {device}", self._finished, self.threads)
        self._lanes = [self._first]
        self._idle = [self._first]

    def post(self, job: Job, *, beside: bool = False) -> None:
        """Run `job` after everything posted before began, and ended unless both run beside others.

        A job that runs beside others must compute with one thread only. No job may raise. Raises
        NotLoaded once the device was closed.
        """
        with self._lock:
            if self._closed:
                raise NotLoaded(f"The service is stopping; {self.device} takes no more work.")
            self._waiting.append((job, beside))
            self._dispatch()

    def run_if_idle(self, job: Job) -> bool:
        """Run `job` here and now if the device has nothing to do, and say whether it did.

        Nothing else runs on the device meanwhile, and nothing that was posted before is overtaken.
        The job must not raise. It has this thread's settings, so one that computes with several
        threads belongs to `post`.
        """
        with self._lock:
            if self._closed or self._waiting or self._running:
                return False
            self._running, self._whole = 1, True
        _run(job, f"device {self.device}")
        self._finished(None)
        return True

    @contextmanager
    def whole_if_free(self) -> Iterator[bool]:
        """For a job beside others: whether it has the device to itself until the block is left.

        It has if no other job runs or waits.
        """
        with self._lock:
            free = self._running == 1 and not self._waiting
            self._whole |= free
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._whole = False
                    self._dispatch()

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` with the device to itself and return its result, or raise its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            try:
                result = function()
            except Exception as error:
                hand_over(loop, _fail, future, error)
            else:
                hand_over(loop, _succeed, future, result)

        self.post(job)
        return await future

    def ask(self) -> None:
        """After something failed here: see whether the device is lost. For its threads."""
        if self.lost is None:
            self.lost = find_lost(self.device)

    def free(self, held: object, release: Callable[[], None]) -> None:
        """Have what holds memory here release it. For its threads.

        On a lost device it is kept to the end of the process: PyTorch records an event when pinned
        memory is freed that was copied to the device, and aborts the process when it cannot.
        """
        if self.lost is None:
            release()
        else:
            self._kept.append(held)

    def refusal(self) -> ModelFaulty:
        """What whoever wants something of a lost device is answered."""
        assert self.lost is not None
        return ModelFaulty(self.lost.detail, remedy=self.lost.remedy, retry_after=_ANEW_SECONDS)

    def close(self) -> None:
        """Finish what was posted, then end the threads; waits for them. May be called twice."""
        with self._lock:
            self._closed = True
            self._dispatch()
        for lane in self._lanes:
            lane.join()

    def _dispatch(self) -> None:
        """Give waiting jobs to idle threads, as far as their order allows; the lock is held."""
        while self._waiting and not self._whole:
            job, beside = self._waiting[0]
            if beside:
                if not self._idle and len(self._lanes) < self.threads:
                    self._add_lane()
                if not self._idle:
                    return
                lane = self._idle.pop()
            elif not self._running:
                lane = self._first
                self._idle.remove(lane)
                self._whole = True
            else:
                return
            self._waiting.popleft()
            self._running += 1
            lane.give(job)
        if self._closed and not self._waiting and not self._running:
            for lane in self._lanes:
                lane.give(None)

    def _add_lane(self) -> None:
        lane = _Lane(f"device {self.device}, {len(self._lanes)}", self._finished, 0)
        self._lanes.append(lane)
        self._idle.append(lane)

    def _finished(self, lane: _Lane | None) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._whole = False
            if lane is not None:
                self._idle.append(lane)
            self._dispatch()


class _Lane:
    """A thread that runs what it is given, and says when it is done."""

    def __init__(self, name: str, finished: Callable[[_Lane], None], torch_threads: int) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._finished = finished
        self._torch_threads = torch_threads
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def give(self, job: Job | None) -> None:
        """Run this next; None ends the thread."""
        self._jobs.put(job)

    def join(self) -> None:
        """Wait for its end, unless called by itself."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)
        while (job := self._jobs.get()) is not None:
            _run(job, self._thread.name)
            del job  # or the last job would keep its tensors alive while the device is idle
            self._finished(self)


def _run(job: Job, where: str) -> None:
    try:
        job()
    except Exception:
        log.exception("a job on %s raised", where)


def hand_over(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object
) -> None:
    """Call back on `loop` from another thread; if the loop is gone, nobody waits any more."""
    try:
        loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        log.debug("an event loop closed before its answer came")


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
