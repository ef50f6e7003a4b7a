"""Batches from backlog: what waits when the device comes free is the next batch.

There is no timer. A lone request starts at once; under load the batch grows by itself, because the
more requests wait while a batch computes, the more the next one holds. Requests are taken first
come, first served; a request is a run of rows, so one that does not fit the rest of a batch gives
it what fits and starts the next, and one with more rows than the largest batch needs no other rule.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from service.errors import (
    BackendFailed,
    BadInput,
    DeadlineExceeded,
    ModelFaulty,
    NotLoaded,
    QueueFull,
)
from service.serving.backends.base import Prepared
from service.serving.backends.rows import random_rows
from service.serving.columns import checked
from service.serving.device import DeviceThread, hand_over
from service.serving.request import Request, Result, Rows, Slice, monotonic
from service.serving.stats import WAIT_SECONDS, BatcherStats, BatchLimits
from service.serving.tally import Tally

Answer = tuple[Request, Result | Exception]

log = logging.getLogger(__name__)

_SLOWING = 1.1
"""How much slower a batch may be taken to have become at once: what computes is told from what was
only held up by other processes, which lasts for a few batches and not for dozens."""


class Batcher:
    """Serves one prepared program to many callers; made and used on an event loop.

    Rows enter on the loop, batches are assembled and run on the device's thread, and answers are
    handed back with one call per batch and loop. The device thread is shared: after each batch the
    next one queues behind whatever else was posted there, so models take turns. A batch that takes
    next to no time runs on the loop instead (`BatchLimits.inline_seconds`), after the loop has
    looked once for others who are there already.
    """

    def __init__(
        self, prepared: Prepared, device: DeviceThread, limits: BatchLimits | None = None
    ) -> None:
        self.prepared = prepared
        self.limits = limits or BatchLimits()
        self._device = device
        self._largest = prepared.batch_sizes[-1]
        self._inputs = prepared.inputs
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._waiting_rows = 0
        self._running_rows = 0
        self._expected_rows = 0
        self._scheduled = False
        self._closing = False
        self._counts: Counter[str] = Counter()
        self._batch_rows: Counter[int] = Counter()
        self._waits = Tally(WAIT_SECONDS)
        self._busy_seconds = 0.0
        self._seconds_per_row = 0.0
        self._batch_seconds: dict[int, float] = {}
        self._inline_seconds = self.limits.inline_seconds if _runs_anywhere(prepared) else 0.0
        self._last_finish = 0.0
        self.fault: Exception | None = None
        """Why the program is out of order: not even rows of our own could be run."""

    async def submit(self, rows: Rows, deadline: float | None = None) -> Result:
        """Outputs for `rows`, N >= 1 of them, each output [N, ...] in the same order.

        `rows` is one array [N, *shape] for a program with one input; for several it is one for each
        of them, a tuple in the program's order or a mapping by name.
        `deadline` is a `time.monotonic` moment after which waiting is pointless. The rows must not
        be changed until the answer came. Cancelling the caller drops rows that still wait. Raises
        BadInput for a wrong shape or type, QueueFull (with `retry_after` seconds) when too many
        rows wait, DeadlineExceeded, BackendFailed if these very rows make the model fail, and
        NotLoaded while the model is being unloaded.
        """
        columns = self._checked(rows)
        now = monotonic()
        if deadline is None:
            deadline = now + self.limits.request_seconds
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        request = Request(columns, future, deadline, now)
        self._enqueue(request, loop)
        request.timer = loop.call_later(deadline - now, self._expire, request)
        try:
            return await future
        finally:
            request.timer.cancel()
            if future.cancelled():
                self._drop(request, "departed")

    def require_room(self) -> None:
        """Raise QueueFull if one more row would find no place; for before a request is read."""
        with self._lock:
            self._check_room(1)

    @contextmanager
    def expecting(self, rows: int) -> Iterator[None]:
        """Hold places for rows that are being decoded, so that what is decoded is bounded too.

        The places are free again when it is left; submit the rows then. Raises QueueFull.
        """
        rows = min(rows, self.limits.queue_rows)  # more than can ever wait is `submit`'s to refuse
        with self._lock:
            self._check_room(rows)
            self._expected_rows += rows
        try:
            yield
        finally:
            with self._lock:
                self._expected_rows -= rows

    def stats(self) -> BatcherStats:
        """A snapshot of the counters; cheap, from any thread."""
        with self._lock:
            return BatcherStats(
                requests=self._counts["requests"],
                answered=self._counts["answered"],
                failed=self._counts["failed"],
                rejected=self._counts["rejected"],
                expired=self._counts["expired"],
                departed=self._counts["departed"],
                rows=self._counts["rows"],
                batches=self._counts["batches"],
                retried=self._counts["retried"],
                busy_seconds=self._busy_seconds,
                waiting_rows=self._waiting_rows,
                running_rows=self._running_rows,
                rows_per_second=1 / self._seconds_per_row if self._seconds_per_row else 0.0,
                batch_rows=dict(self._batch_rows),
                queue_seconds=self._waits.read(),
            )

    async def close(self, *, drain: bool = True) -> None:
        """Take no more requests; answer those that wait (or fail them with NotLoaded).

        Returns when the device runs nothing of this batcher any more. The prepared program is
        left to its owner.
        """
        self._closing = True
        if not drain:
            with self._lock:
                left = list(self._waiting)
            for request in left:
                if self._drop(request, "failed"):
                    _set_error(request.future, NotLoaded("The model was unloaded meanwhile."))
        while self._scheduled:
            await self._device.call(_nothing)  # comes back behind the turn that is under way

    def _checked(self, rows: Rows) -> tuple[Tensor, ...]:
        columns = checked(rows, self._inputs)
        count = len(columns[0])
        if count > self.limits.queue_rows:
            raise BadInput(
                f"The request has {count} rows; at most {self.limits.queue_rows} can wait.",
                remedy="Send fewer rows at a time, or raise the queue's size.",
            )
        return columns

    def _enqueue(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._closing:
                raise NotLoaded("The model is being unloaded.")
            if self.fault is not None:
                raise self._faulty()
            self._counts["requests"] += 1
            self._check_room(len(request))
            self._waiting.append(request)
            self._waiting_rows += len(request)
            first = not self._scheduled
            self._scheduled = True
        if not first:
            return
        if self._is_quick(len(request)):
            loop.call_soon(self._begin)
        else:
            self._schedule()

    def _begin(self) -> None:
        """Run what came in the same moment here, if that is quick and the device idle."""
        with self._lock:
            rows = min(self._waiting_rows, self._largest)
        if not (self._is_quick(rows) and self._device.run_if_idle(self._turn)):
            self._schedule()

    def _is_quick(self, rows: int) -> bool:
        """Whether a batch of that many rows is known to take less than `inline_seconds`."""
        return self._batch_seconds.get(rows, math.inf) < self._inline_seconds

    def _check_room(self, rows: int) -> None:
        """Raise QueueFull if `rows` more find no place; the lock is held."""
        taken = self._waiting_rows + self._expected_rows
        if taken + rows > self.limits.queue_rows:
            self._counts["rejected"] += 1
            raise QueueFull(
                f"{taken} rows wait already, of at most {self.limits.queue_rows}.",
                retry_after=round(self._seconds_until_room(taken + rows), 3),
            )

    def _seconds_until_room(self, wanted: int) -> float:
        """When enough rows will have been taken, at the rate measured so far (1 s if unknown)."""
        excess = wanted - self.limits.queue_rows
        return self._seconds_per_row * (excess + self._running_rows) or 1.0

    def _drop(self, request: Request, why: str) -> bool:
        """Stop waiting for a request; False if it already left or all its rows were taken."""
        with self._lock:
            if request.gone or (why == "expired" and not request.waiting):
                return False
            request.gone = True
            self._waiting_rows -= request.waiting
            self._counts[why] += 1
            return True

    def _expire(self, request: Request) -> None:
        if self._drop(request, "expired"):
            _set_error(request.future, _too_late(request))

    # From here on: the device's thread, or the loop in its stead.

    def _turn(self) -> None:
        """Run one batch, then queue for the next if anything waits."""
        try:
            batch, answers = self._assemble()
            self._deliver(answers)
            if batch:
                answers = self._execute(batch)
                self._deliver(answers)
                if any(isinstance(answer, BackendFailed) for _, answer in answers):
                    self._diagnose()
        finally:
            with self._lock:
                self._running_rows = 0
                self._scheduled = bool(self._waiting)
                again = self._scheduled
            if again:
                self._schedule()

    def _schedule(self) -> None:
        try:
            self._device.post(self._turn)
        except NotLoaded as stopping:  # the device was closed before its batchers
            with self._lock:
                self._closing, self._scheduled = True, False
                left = [request for request in self._waiting if not request.gone]
                for request in left:
                    self._leave(request, "failed")
                self._waiting.clear()
            self._deliver([(request, NotLoaded(stopping.detail)) for request in left])

    def _assemble(self) -> tuple[list[Slice], list[Answer]]:
        room = self._largest
        batch: list[Slice] = []
        late: list[Answer] = []
        now = monotonic()
        with self._lock:
            while room and self._waiting:
                request = self._waiting[0]
                if not request.gone and request.future.cancelled():
                    self._leave(request, "departed")
                elif not request.gone and request.deadline <= now:
                    self._leave(request, "expired")
                    late.append((request, _too_late(request)))
                if request.gone:
                    self._waiting.popleft()
                    continue
                stop = request.taken + min(room, request.waiting)
                batch.append(Slice(request, request.taken, stop))
                if not request.taken:
                    request.started = now
                    self._waits.add(now - request.arrived)
                room -= stop - request.taken
                self._waiting_rows -= stop - request.taken
                request.taken = stop
                if not request.waiting:
                    self._waiting.popleft()
            self._running_rows = self._largest - room
        return batch, late

    def _leave(self, request: Request, why: str) -> None:
        request.gone = True
        self._waiting_rows -= request.waiting
        self._counts[why] += 1

    def _execute(self, batch: list[Slice]) -> list[Answer]:
        if self.fault is not None:
            return [answer for one in batch for answer in self._blame(one, self._faulty())]
        return self._try(batch)

    def _diagnose(self) -> None:
        """Whether requests failed or the program does: rows of our own tell the two apart."""
        try:
            self.prepared.run(random_rows(self._inputs, 1))
        except Exception as fault:
            log.error("a program is out of order: %s", fault)
            self.fault = fault

    def _faulty(self) -> ModelFaulty:
        return ModelFaulty(f"{type(self.fault).__name__}: {self.fault}", retry_after=1.0)

    def _try(self, batch: list[Slice]) -> list[Answer]:
        try:
            return self._run(batch)
        except Exception as error:
            if len(batch) == 1:
                return self._blame(batch[0], error)
            log.warning("a batch of %d requests failed, each is tried alone: %s", len(batch), error)
        answers = []
        for one in batch:
            with self._lock:
                self._counts["retried"] += 1
            try:
                answers += self._run([one])
            except Exception as error:
                answers += self._blame(one, error)
        return answers

    def _run(self, batch: list[Slice]) -> list[Answer]:
        start = monotonic()
        sizes = [len(one) for one in batch]
        count = sum(sizes)
        if len(batch) == 1:
            rows = batch[0].rows
        else:
            rows = tuple(torch.cat(c) for c in zip(*(one.rows for one in batch), strict=True))
        outputs = self.prepared.run(rows)
        finish = monotonic()
        if any(output.dim() == 0 or len(output) != count for output in outputs):
            raise BackendFailed("An output does not have one row for each row of the input.")
        self._record(count, start, finish, batch[0].request.arrived)
        pieces = (
            [outputs]
            if len(batch) == 1
            else zip(*(torch.split(output, sizes) for output in outputs), strict=True)
        )
        answers: list[Answer] = []
        for one, piece in zip(batch, pieces, strict=True):
            result = one.request.add(piece, finish - start, count)
            if result is not None:
                answers.append((one.request, result))
        return answers

    def _record(self, rows: int, start: float, finish: float, arrived: float) -> None:
        # A row's share of the whole cycle, turns of other models included, while there is backlog.
        seconds = (finish - min(start, max(self._last_finish, arrived))) / rows
        with self._lock:
            self._last_finish = finish
            self._seconds_per_row += (seconds - self._seconds_per_row) * (
                0.2 if self._seconds_per_row else 1.0
            )
            self._busy_seconds += finish - start
            took = self._batch_seconds.get(rows, math.inf)
            self._batch_seconds[rows] = min(finish - start, took * _SLOWING)
            self._batch_rows[rows] += 1
            self._counts["rows"] += rows
            self._counts["batches"] += 1

    def _blame(self, one: Slice, error: Exception) -> list[Answer]:
        """The request that fails by itself gets the error; its other rows need not run."""
        with self._lock:
            if not one.request.gone:
                one.request.gone = True
                self._waiting_rows -= one.request.waiting
        if isinstance(error, ModelFaulty):
            return [(one.request, error)]
        failure = BackendFailed(
            error.detail if isinstance(error, BackendFailed) else f"{type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        return [(one.request, failure)]

    def _deliver(self, answers: list[Answer]) -> None:
        loops = {request.loop for request, _ in answers}
        here = _running_loop()
        for loop in loops:
            mine = [answer for answer in answers if answer[0].loop is loop]
            if loop is here:
                self._answer(mine)
            else:
                hand_over(loop, self._answer, mine)

    # And back on the loop.

    def _answer(self, answers: list[Answer]) -> None:
        answered = failed = 0
        for request, answer in answers:
            if request.future.done():
                continue
            if isinstance(answer, Result):
                request.future.set_result(answer)
                answered += 1
            else:
                request.future.set_exception(answer)
                failed += isinstance(answer, BackendFailed | ModelFaulty)
        with self._lock:
            self._counts["answered"] += answered
            self._counts["failed"] += failed


def _too_late(request: Request) -> DeadlineExceeded:
    waited = monotonic() - request.arrived
    return DeadlineExceeded(f"The request waited {waited:.3f} s, beyond its deadline.")


def _set_error(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of this thread; None on the device's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _runs_anywhere(prepared: Prepared) -> bool:
    """Whether any thread may run the program: on a CPU, and on one thread of it."""
    about = prepared.describe()
    return about.place == "cpu" and about.threads == 1


def _nothing() -> None:
    return None
