"""How much may wait for a model, and what a batcher counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from service.serving.tally import Tallied, Tally

WAIT_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""Bounds of the histogram of queue waits, in seconds."""


@dataclass(frozen=True)
class BatchLimits:
    """How much may wait for a model, and for how long.

    `queue_rows` (rows, default 1024): rows that may wait; a request beyond them gets QueueFull.
    `request_seconds` (seconds, default 30): a request that still waits after this long is dropped
    with DeadlineExceeded, unless it brought a deadline of its own.
    `inline_seconds` (seconds, default 0 = never): a batch that is known to compute in less than
    this, on one CPU thread, runs on the event loop when the device is idle. The device's thread
    would have to be woken, and contend with the loop for the interpreter.
    """

    queue_rows: int = 1024
    request_seconds: float = 30.0
    inline_seconds: float = 0.0


@dataclass(frozen=True)
class BatcherStats:
    """Counters since the batcher began, and how things stand now.

    `requests` came to the queue, and every one of them ends as one of the following or still waits:
    `answered`, `failed`, `rejected` (queue full), `expired` (deadline) and `departed` (the client
    left) count requests; `retried` counts slices that ran alone because their batch failed;
    `batch_rows` counts batches by their rows; `busy_seconds` is device time; `queue_seconds` tells
    how long requests waited for the start of their first batch, in seconds.
    """

    requests: int = 0
    answered: int = 0
    failed: int = 0
    rejected: int = 0
    expired: int = 0
    departed: int = 0
    rows: int = 0
    batches: int = 0
    retried: int = 0
    busy_seconds: float = 0.0
    waiting_rows: int = 0
    running_rows: int = 0
    rows_per_second: float = 0.0
    batch_rows: Mapping[int, int] = field(default_factory=dict)
    queue_seconds: Tallied = field(default_factory=Tally(WAIT_SECONDS).read)
