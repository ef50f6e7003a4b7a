"""Batches from backlog: what waits when the device comes free is the next batch.

There is no timer. A lone request starts at once; under load the batch grows by itself, because the
more requests wait while a batch computes, the more the next one holds.

A program whose `Prepared.streams` run beside each other shares the backlog out among them, in the
smallest batches that cost little: a core that answers a batch, and waits for what its callers send
next, takes what waits meanwhile and leaves the other cores at work. Only when fewer rows wait than
there are streams, and nothing runs, do they get all cores together.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from service.errors import BackendFailed, ModelFaulty, NotLoaded, QueueFull
from service.serving.alarm import Alarm
from service.serving.backends.base import Prepared, Streams
from service.serving.backends.parts import BatchPart, joined
from service.serving.backends.rows import is_image, random_rows
from service.serving.backlog import Backlog, too_late
from service.serving.columns import checked, too_many
from service.serving.device import Device, hand_over
from service.serving.request import Answer, Request, Result, Rows, Slice, monotonic
from service.serving.stats import BatcherStats, BatchLimits

Run = Callable[[Sequence[BatchPart]], tuple[Tensor, ...]]

log = logging.getLogger(__name__)

_PIECES = 4
"""In about how many batches a stream takes its share of a long backlog."""


class Batcher:
    """Serves one prepared program to many callers; made and used on an event loop.

    Rows enter on the loop, batches are assembled and run on the device's threads, and answers are
    handed back with one call per batch and loop. The device is shared: after each turn the next one
    queues behind whatever else was posted there, so models take turns. A batch that takes little
    time runs on the loop instead (`BatchLimits.inline_seconds`), after the loop has looked once for
    others who are there already.
    """

    def __init__(
        self, prepared: Prepared, device: Device, limits: BatchLimits | None = None
    ) -> None:
        self.prepared = prepared
        self.limits = limits or BatchLimits()
        self._device = device
        self._largest = prepared.batch_sizes[-1]
        self._inputs = prepared.inputs
        self._streams = prepared.streams
        self._run = _joining(prepared.run)
        self._takes_levels = False
        self._run_beside = self._run
        if self._streams is not None:
            self._takes_levels = self._streams.parts is not None
            self._run_beside = self._streams.parts or _joining(self._streams.run)
        self._backlog = Backlog(self.limits.queue_rows)
        self._alarm = Alarm(self._expire)
        self._lock = threading.Lock()
        self._turns = 0
        """How many turns run or are posted: at most one for each stream."""
        self._closing = False
        inline = self._streams is None and _runs_anywhere(prepared)
        self._inline_seconds = self.limits.inline_seconds if inline else 0.0
        self._fault: Exception | None = None

    @property
    def fault(self) -> Exception | None:
        """Why the program is out of order: not even rows of our own could be run."""
        return self._device.lost or self._fault

    async def submit(self, rows: Rows, deadline: float | None = None) -> Result:
        """Outputs for `rows`, N >= 1 of them, each output [N, ...] in the same order.

        `rows` is one array [N, *shape] for a program with one input; for several it is one for each
        of them, a tuple in the program's order or a mapping by name. Images may come as a part of
        grey levels, which is worth it where `takes_levels`.
        `deadline` is a `time.monotonic` moment after which waiting is pointless. The rows must not
        be changed until the answer came. Cancelling the caller drops rows that still wait. Raises
        BadInput for a wrong shape or type, QueueFull (with `retry_after` seconds) when too many
        rows wait, DeadlineExceeded, BackendFailed if these very rows make the model fail, and
        NotLoaded while the model is being unloaded.
        """
        part = self._checked(rows)
        now = monotonic()
        if deadline is None:
            deadline = now + self.limits.request_seconds
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        request = Request(part, future, deadline, now)
        self._enqueue(request, loop)
        self._alarm.set(loop, deadline)
        try:
            return await future
        finally:
            if future.cancelled():
                self._backlog.depart(request)

    @property
    def takes_levels(self) -> bool:
        """Whether grey levels go to the device as they are, and are normalised there."""
        return self._takes_levels and is_image(self._inputs)

    def full(self) -> QueueFull | None:
        """What one more row would be refused with, if it would: for before a request is read.

        It is counted as refused. It is not raised: to unwind the calls costs more than to look.
        """
        return self._backlog.full()

    def expecting(self, rows: int) -> AbstractContextManager[None]:
        """Hold places for rows that are being decoded, so that what is decoded is bounded too.

        The places are free again when it is left; submit the rows then. Raises QueueFull.
        """
        return self._backlog.expecting(rows)

    def stats(self) -> BatcherStats:
        """A snapshot of the counters; cheap, from any thread."""
        return self._backlog.stats()

    async def close(self, *, drain: bool = True) -> None:
        """Take no more requests; answer those that wait (or fail them with NotLoaded).

        Returns when the device runs nothing of this batcher any more. The prepared program is
        left to its owner.
        """
        self._closing = True
        if not drain:
            for request in self._backlog.clear("failed"):
                _set_error(request.future, NotLoaded("The model was unloaded meanwhile."))
        try:
            while self._turns:
                await self._device.call(_nothing)  # comes back behind the turns that are under way
        finally:
            if not self._backlog:  # or it would hold the program until it rings
                self._alarm.clear()

    def _checked(self, rows: Rows) -> BatchPart:
        part = checked(rows, self._inputs, levels=self.takes_levels)
        count = len(part)
        if count > self.limits.queue_rows:
            raise too_many(count, self.limits.queue_rows)
        return part

    def _enqueue(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        most = 1 if self._streams is None else self._streams.count
        with self._lock:
            if self._closing:
                raise NotLoaded("The model is being unloaded.")
            if self.fault is not None:
                raise self._faulty()
            self._backlog.put(request)
            more = min(most - self._turns, len(request))
            self._turns += more
        if more and self._is_quick(len(request)):
            loop.call_soon(self._begin)
            return
        for _ in range(more):
            self._schedule()

    def _begin(self) -> None:
        """Run what came in the same moment here, if that is quick and the device idle."""
        rows = min(self._backlog.rows, self._largest)
        if not (self._is_quick(rows) and self._device.run_if_idle(self._turn)):
            self._schedule()

    def _is_quick(self, rows: int) -> bool:
        """Whether a batch of that many rows is known to take less than `inline_seconds`."""
        return self._backlog.seconds_of(rows) < self._inline_seconds

    def _expire(self) -> float | None:
        """Tell those that have waited too long; the deadline of who waits on, if anybody does."""
        late, following = self._backlog.overdue()
        self._deliver([(request, too_late(request)) for request in late])
        return following

    # From here on: the device's threads, or the loop in their stead.

    def _schedule(self) -> None:
        try:
            self._device.post(self._turn, beside=self._streams is not None)
        except NotLoaded as stopping:  # the device was closed before its batchers
            with self._lock:
                self._closing = True
                self._turns -= 1
            left = self._backlog.clear("failed")
            self._deliver([(request, NotLoaded(stopping.detail)) for request in left])

    def _turn(self) -> None:
        """Run what waits, as much as one turn may take; then queue for the next if more does."""
        try:
            if self._streams is None:
                self._run_batch(self._largest, self._run)
            else:
                self._stream_turn(self._streams)
        finally:
            with self._lock:
                again = bool(self._backlog)
                self._turns -= not again
            if again:
                self._schedule()

    def _stream_turn(self, streams: Streams) -> None:
        """This stream's share of what waits now, in small batches; few rows get all the cores.

        A long backlog is taken in fewer, larger ones: its callers wait for the others anyway.
        """
        waiting = self._backlog.rows
        if streams.parts is None:
            waiting = min(waiting, self._largest)
            if waiting < streams.count:
                with self._device.whole_if_free() as free:
                    if free:
                        self._run_batch(waiting or 1, self._run)
                        return
        share = min(self._largest, max(1, -(-waiting // streams.count)))
        rows = max(streams.rows, share // _PIECES)
        while share > 0:
            ran = self._run_batch(min(share, rows), self._run_beside)
            if not ran:
                return
            share -= ran

    def _run_batch(self, room: int, run: Run) -> int:
        """Answer at most `room` of the rows that wait; how many there were."""
        taken = self._backlog.take(room)
        try:
            self._deliver([(request, too_late(request)) for request in taken.late])
            if not taken.batch:
                return 0
            answers = self._execute(taken.batch, run)
            self._deliver(answers)
            if any(isinstance(answer, BackendFailed) for _, answer in answers):
                self._diagnose(run)
        finally:
            self._backlog.ran(taken)
        return taken.rows

    def _execute(self, batch: list[Slice], run: Run) -> list[Answer]:
        if self.fault is not None:
            return [answer for one in batch for answer in self._blame(one, self._faulty())]
        try:
            return self._compute(batch, run)
        except Exception as error:
            self._device.ask()
            if len(batch) == 1:
                return self._blame(batch[0], error)
            if self._device.lost is not None:  # nobody can tell whose rows did that
                return [answer for one in batch for answer in self._blame(one, self._faulty())]
            log.warning("a batch of %d requests failed, each is tried alone: %s", len(batch), error)
        answers = []
        for one in batch:
            self._backlog.count(retried=1)
            try:
                answers += self._compute([one], run)
            except Exception as error:
                self._device.ask()
                answers += self._blame(one, error)
        return answers

    def _diagnose(self, run: Run) -> None:
        """Whether requests failed or the program does: rows of our own tell the two apart."""
        try:
            run([BatchPart(random_rows(self._inputs, 1))])
        except Exception as fault:
            log.error("a program is out of order: %s", fault)
            self._device.ask()
            self._fault = fault

    def _faulty(self) -> ModelFaulty:
        if self._device.lost is not None:
            return self._device.refusal()
        return ModelFaulty(f"{type(self._fault).__name__}: {self._fault}", retry_after=1.0)

    def _compute(self, batch: list[Slice], run: Run) -> list[Answer]:
        start = monotonic()
        count = sum(map(len, batch))
        outputs = run([one.rows for one in batch])
        finish = monotonic()
        if any(output.dim() == 0 or len(output) != count for output in outputs):
            raise BackendFailed("An output does not have one row for each row of the input.")
        self._backlog.record(count, start, finish, batch[0].request.arrived)
        arrays = tuple(output.numpy() for output in outputs)
        return self._backlog.add(batch, arrays, finish - start)

    def _blame(self, one: Slice, error: Exception) -> list[Answer]:
        """The request that fails by itself gets the error; its other rows need not run."""
        self._backlog.abandon(one.request)
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
        self._backlog.count(answered=answered, failed=failed)


def _joining(run: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Run:
    """`run` for several requests' rows, which are laid behind each other first."""
    return lambda parts: run(joined(parts))


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
