"""Requests that wait for one model: bounded in rows, first come, first served, counted.

A request is a run of rows, so one that does not fit the rest of a batch gives it what fits and
starts the next, and one with more rows than the largest batch needs no other rule. Used from any
thread.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.errors import DeadlineExceeded, QueueFull
from service.serving.request import Answer, Outputs, Request, Slice, monotonic
from service.serving.stats import WAIT_SECONDS, BatcherStats
from service.serving.tally import Tally

_SLOWING = 1.1
"""How much slower a batch may be taken to have become at once: what computes is told from what was
only held up by other processes, which lasts for a few batches and not for dozens."""


@dataclass(frozen=True)
class Taken:
    """Rows for one batch, how many they are, and the requests that came too late to be in it."""

    batch: list[Slice]
    rows: int
    late: list[Request]


class Backlog:
    """At most `queue_rows` rows that wait, and the count of what became of every request."""

    def __init__(self, queue_rows: int) -> None:
        self._queue_rows = queue_rows
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._waiting_rows = 0
        self._running_rows = 0
        self._expected_rows = 0
        self._counts: Counter[str] = Counter()
        self._batch_rows: Counter[int] = Counter()
        self._waits = Tally(WAIT_SECONDS)
        self._busy_seconds = 0.0
        self._seconds_per_row = 0.0
        self._batch_seconds: dict[int, float] = {}
        self._last_finish = 0.0

    def __bool__(self) -> bool:
        """Whether anything waits, be it only a request that has left and must be cleared away."""
        return bool(self._waiting)

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._waiting_rows

    def put(self, request: Request) -> None:
        """Let a request wait. Raises QueueFull."""
        with self._lock:
            self._counts["requests"] += 1
            self._check_room(len(request))
            self._waiting.append(request)
            self._waiting_rows += len(request)

    def full(self) -> QueueFull | None:
        """What one more row would be refused with, if it would find no place."""
        with self._lock:
            return self._refused(1)

    @contextmanager
    def expecting(self, rows: int) -> Iterator[None]:
        """Hold places for rows that are on their way until it is left. Raises QueueFull."""
        rows = min(rows, self._queue_rows)  # more than can ever wait is refused elsewhere
        with self._lock:
            self._check_room(rows)
            self._expected_rows += rows
        try:
            yield
        finally:
            with self._lock:
                self._expected_rows -= rows

    def take(self, room: int) -> Taken:
        """The next rows, at most `room` of them, now running; give them back with `ran`."""
        left = room
        batch: list[Slice] = []
        late: list[Request] = []
        now = monotonic()
        with self._lock:
            while left and self._waiting:
                request = self._waiting[0]
                if not request.gone and request.future.cancelled():
                    self._leave(request, "departed")
                elif not request.gone and request.deadline <= now:
                    self._leave(request, "expired")
                    late.append(request)
                if request.gone:
                    self._waiting.popleft()
                    continue
                stop = request.taken + min(left, request.waiting)
                batch.append(Slice(request, request.taken, stop))
                if not request.taken:
                    request.started = now
                    self._waits.add(now - request.arrived)
                left -= stop - request.taken
                self._waiting_rows -= stop - request.taken
                request.taken = stop
                if not request.waiting:
                    self._waiting.popleft()
            self._running_rows += room - left
        return Taken(batch, room - left, late)

    def ran(self, taken: Taken) -> None:
        """The rows of `taken` run no more, whatever became of them."""
        with self._lock:
            self._running_rows -= taken.rows

    def add(self, batch: list[Slice], outputs: Outputs, seconds: float) -> list[Answer]:
        """Give each its rows of a batch's outputs; the results of those that have all of theirs."""
        results: list[Answer] = []
        begin, rows = 0, len(outputs[0])
        with self._lock:
            for one in batch:
                end = begin + len(one)
                part = outputs if len(batch) == 1 else tuple(each[begin:end] for each in outputs)
                result = one.request.add(one.start, part, seconds, rows)
                if result is not None:
                    results.append((one.request, result))
                begin = end
        return results

    def depart(self, request: Request) -> None:
        """Stop waiting for a request whose caller has left."""
        with self._lock:
            if not request.gone:
                self._leave(request, "departed")

    def overdue(self) -> tuple[list[Request], float | None]:
        """Stop waiting for all whose deadline has passed; the earliest deadline of the others."""
        now = monotonic()
        late: list[Request] = []
        following = math.inf
        with self._lock:
            for request in self._waiting:
                if request.gone:
                    continue
                if request.deadline <= now:
                    self._leave(request, "expired")
                    late.append(request)
                else:
                    following = min(following, request.deadline)
        return late, following if following < math.inf else None

    def abandon(self, request: Request) -> None:
        """Run no more rows of a request that has failed."""
        with self._lock:
            if not request.gone:
                request.gone = True
                self._waiting_rows -= request.waiting

    def clear(self, why: str) -> list[Request]:
        """Drop all that wait, and say which they were."""
        with self._lock:
            left = [request for request in self._waiting if not request.gone]
            for request in left:
                self._leave(request, why)
            self._waiting.clear()
        return left

    def count(self, **counts: int) -> None:
        """Add to counters of `BatcherStats`, by name."""
        with self._lock:
            self._counts.update(counts)

    def record(self, rows: int, start: float, finish: float, arrived: float) -> None:
        """A batch of `rows` ran from `start` to `finish`; its first request came at `arrived`."""
        with self._lock:
            # A row's share of the whole cycle, turns of others included, while there is backlog.
            seconds = max(0.0, finish - max(self._last_finish, arrived)) / rows
            self._last_finish = max(self._last_finish, finish)
            self._seconds_per_row += (seconds - self._seconds_per_row) * (
                0.2 if self._seconds_per_row else 1.0
            )
            self._busy_seconds += finish - start
            took = self._batch_seconds.get(rows, math.inf)
            self._batch_seconds[rows] = min(finish - start, took * _SLOWING)
            self._batch_rows[rows] += 1
            self._counts["rows"] += rows
            self._counts["batches"] += 1

    def seconds_of(self, rows: int) -> float:
        """How long a batch of that many rows computes; infinite if none did yet."""
        return self._batch_seconds.get(rows, math.inf)

    def stats(self) -> BatcherStats:
        """A snapshot of the counters."""
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

    def _leave(self, request: Request, why: str) -> None:
        request.gone = True
        self._waiting_rows -= request.waiting
        self._counts[why] += 1

    def _check_room(self, rows: int) -> None:
        """Raise QueueFull if `rows` more find no place; the lock is held."""
        if (refused := self._refused(rows)) is not None:
            raise refused

    def _refused(self, rows: int) -> QueueFull | None:
        taken = self._waiting_rows + self._expected_rows
        if taken + rows <= self._queue_rows:
            return None
        self._counts["rejected"] += 1
        return QueueFull(
            f"{taken} rows wait already, of at most {self._queue_rows}.",
            retry_after=round(self._seconds_until_room(taken + rows), 3),
        )

    def _seconds_until_room(self, wanted: int) -> float:
        """When enough rows will have been taken, at the rate measured so far (1 s if unknown)."""
        excess = wanted - self._queue_rows
        return self._seconds_per_row * (excess + self._running_rows) or 1.0


def too_late(request: Request) -> DeadlineExceeded:
    """What a request is told that waited beyond its deadline."""
    waited = monotonic() - request.arrived
    return DeadlineExceeded(f"The request waited {waited:.3f} s, beyond its deadline.")
