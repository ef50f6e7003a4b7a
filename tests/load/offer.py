"""Offers load from a process of its own, at a fixed rate or by callers that wait for their answers.

    python -m tests.load.offer < plan.json > outcome.json

At a fixed rate requests are sent when they are due, whatever has become of those before: a service
that slows down is not asked less. `/health/live` is asked at the same time on a connection apart.
"""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httptools

from tests.running import ROOT

_HEALTH = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
_HEALTH_SECONDS = 0.02
_STRAGGLERS_SECONDS = 60.0


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
        [sys.executable, "-m", "tests.load.offer"],
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


class _Wire(asyncio.Protocol):
    """One connection; `ask` sends a request and resolves to status, headers and body."""

    def __init__(self) -> None:
        self._answer: asyncio.Future[tuple[int, dict[bytes, bytes], bytes]] | None = None
        self._transport: Any = None
        self.lost = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, dict[bytes, bytes], bytes]]:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._body = b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._headers, self._body))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((0, {}, b""))


class _Load:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.request = base64.b64decode(plan["request"])
        self.other = base64.b64decode(plan["other"])
        self.statuses: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.health: list[float] = []
        self.odd = self.late = self.sent = 0
        self.done = 0
        self.end = 0.0

    async def wire(self) -> _Wire:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(_Wire, self.plan["host"], self.plan["port"])
        return wire

    async def one(self, wire: _Wire, due: float) -> bool:
        """Send the next request; whether the connection is still of use."""
        self.sent += 1
        every = self.plan.get("every", 0)
        is_other = every and self.sent % every == 0
        status, headers, body = await wire.ask(self.other if is_other else self.request)
        now = time.perf_counter()
        if is_other:
            self.others[str(status)] += 1
            return status != 0
        self.statuses[str(status)] += 1
        if status == 200:
            self.answered.append(now - due)
            self.done += now <= self.end
        elif status == 429:
            self.refused.append(now - due)
            right = b"retry-after" in headers and b'"queue_full"' in body
            self.odd += not right
        return status != 0

    async def watch_health(self) -> None:
        wire = await self.wire()
        while time.perf_counter() < self.end:
            began = time.perf_counter()
            status, _, _ = await wire.ask(_HEALTH)
            self.health.append(time.perf_counter() - began if status == 200 else float("inf"))
            await asyncio.sleep(_HEALTH_SECONDS)

    async def closed(self) -> None:
        async def caller() -> None:
            wire = await self.wire()
            while time.perf_counter() < self.end:
                if not await self.one(wire, time.perf_counter()):
                    wire = await self.wire()

        await asyncio.gather(*(caller() for _ in range(self.plan.get("connections", 8))))

    async def open(self) -> None:
        idle = [await self.wire() for _ in range(self.plan.get("connections", 8))]
        tasks: set[asyncio.Task[None]] = set()
        began = time.perf_counter()

        async def use(wire: _Wire, due: float) -> None:
            if wire.lost:  # the service closes what is idle for long
                wire = await self.wire()
            idle.append(wire if await self.one(wire, due) else await self.wire())

        count = 0
        while (due := began + count / self.plan["rate"]) < self.end:
            count += 1
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            if not idle:
                self.late += 1
                await asyncio.sleep(0)
                continue
            task = asyncio.create_task(use(idle.pop(), due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait(tasks, timeout=_STRAGGLERS_SECONDS)

    async def run(self) -> dict[str, Any]:
        self.end = time.perf_counter() + self.plan["seconds"]
        watch = asyncio.create_task(self.watch_health())
        await (self.open() if self.plan.get("rate") else self.closed())
        await watch
        return {
            "seconds": self.plan["seconds"],
            "sent": self.sent,
            "rate": self.done / self.plan["seconds"],
            "statuses": self.statuses,
            "odd": self.odd,
            "late": self.late,
            "answered": sorted(self.answered),
            "refused": sorted(self.refused),
            "health": sorted(self.health),
            "others": self.others,
        }


if __name__ == "__main__":
    json.dump(asyncio.run(_Load(json.loads(sys.stdin.read())).run()), sys.stdout)
