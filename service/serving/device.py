"""One thread per device: whatever computes there is run by it, one job at a time, in order.

A single thread keeps two models from fighting over the same cores, needs no lock around a backend,
and costs a lone request one hop there and one back. A plain thread fed by `queue.SimpleQueue` was
measured against `loop.run_in_executor`: 52 against 58 microseconds there and back (uvloop: 48
against 55), so the plain thread it is. On a busy machine a hop waits for the scheduler too, and
takes several times as long as a small network: `run_if_idle` is for work that is not worth it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from service.errors import NotLoaded

T = TypeVar("T")
log = logging.getLogger(__name__)


def available_cpus() -> int:
    """CPUs this process may really use: its affinity, and the control group's quota if any."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, round(int(quota) / int(period))))


class DeviceThread:
    """Runs jobs for one device (`cpu`, `cuda:0`) in the order in which they were posted."""

    def __init__(self, device: str = "cpu", threads: int = 0) -> None:
        """`threads` bounds the CPU threads of one run; 0 means every CPU that is available."""
        self.device = device
        self.threads = threads or available_cpus()
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._closed = False
        self._unfinished = 0
        self._closing = threading.Lock()
        self._running = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=f"device {device}", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], object]) -> None:
        """Run `job` on the device thread after everything posted before; it must not raise.

        Raises NotLoaded once the thread was closed.
        """
        with self._closing:
            if self._closed:
                raise NotLoaded(f"The service is stopping; {self.device} takes no more work.")
            self._unfinished += 1
            self._jobs.put(job)

    def run_if_idle(self, job: Callable[[], object]) -> bool:
        """Run `job` here and now if the device has nothing to do, and say whether it did.

        Nothing else runs on the device meanwhile, and nothing that was posted before is overtaken.
        The job must not raise. It has this thread's settings, so one that computes with several
        threads belongs to `post`.
        """
        with self._closing:
            if self._closed or self._unfinished or not self._running.acquire(blocking=False):
                return False
        try:
            self._run(job)
        finally:
            self._running.release()
        return True

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the device thread and return its result, or raise its error."""
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

    def close(self) -> None:
        """Finish what was posted, then end the thread; waits for it. May be called twice."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        while (job := self._jobs.get()) is not None:
            with self._running:
                self._run(job)
            with self._closing:
                self._unfinished -= 1
            del job  # or the last job would keep its tensors alive while the device is idle

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception:
            log.exception("a job on device %s raised", self.device)


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
