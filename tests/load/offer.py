"""Offers load from a process of its own, at a fixed rate or by callers that wait for their answers.

At a fixed rate requests are sent when they are due, whatever has become of those before: a service
that slows down is not asked less. `/health/live` is asked at the same time on a connection apart.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from tests.running import ROOT


@dataclass(frozen=True)
class Outcome:
    """What became of the requests; latencies in seconds, sorted, counted from when they were due.

    `rate` is answers with status 200 a second; `odd` counts refusals that lack Retry-After or the
    code; `late` counts requests that were due while every connection was in use.
    """

    seconds: float
    sent: int
    rate: float
    statuses: dict[str, int]
    odd: int
    late: int
    answered: list[float] = field(repr=False)
    refused: list[float] = field(repr=False)
    health: list[float] = field(repr=False)
    others: dict[str, int] = field(default_factory=dict)


def quantile(ordered: list[float], share: float) -> float:
    """The value that `share` of the sorted values do not exceed; infinite without values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("inf")


def offer(
    url: str,
    request: bytes,
    *,
    seconds: float,
    rate: float = 0.0,
    connections: int = 8,
    other: bytes = b"",
    every: int = 0,
) -> Outcome:
    """Send `request` at `rate` a second, or as fast as `connections` callers get answers.

    Each `every`-th request is `other` instead, and its statuses are counted apart.
    """
    plan = start(
        url, request, seconds=seconds, rate=rate, connections=connections, other=other, every=every
    )
    return finish(plan)


def start(url: str, request: bytes, **plan: Any) -> subprocess.Popen[bytes]:
    """`offer`, in the background; `finish` waits for its outcome."""
    host, port = url.removeprefix("http://").split(":")
    encoded = {
        "host": host,
        "port": int(port),
        "request": base64.b64encode(request).decode(),
        **plan,
        "other": base64.b64encode(plan.get("other", b"")).decode(),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.load.generator"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps(encoded).encode())
    process.stdin.close()
    process.stdin = None
    return process


def finish(process: subprocess.Popen[bytes]) -> Outcome:
    """The outcome of what `start` began."""
    try:
        output, _ = process.communicate(timeout=600)
    except BaseException:  # the test's time is over: ask the service no more
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0
    return Outcome(**json.loads(output))
