"""The load: one process, N connections, each sending its next request when its answer came.

    python -m benchmarks.load < plan.json

Run as a process of its own, so that it shares no interpreter with what it measures. It speaks raw
HTTP/1.1 over uvloop with requests that are built once: what it costs is printed with the results,
beside its own ceiling against a server that does nothing. The loop is closed: a slow server is
asked less often, so latencies are those of N callers that wait, not of a fixed arrival rate.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field
from typing import Any

import httptools
import uvloop

STRAGGLERS_SECONDS = 60.0


@dataclass(frozen=True)
class Plan:
    """What to send: `requests` are whole HTTP requests, sent in turn by every connection.

    `capture` asks for the answers to the first round over `requests` instead of a measurement.
    """

    host: str
    port: int
    requests: tuple[bytes, ...]
    concurrency: int = 1
    warm_seconds: float = 0.2
    seconds: float = 1.0
    capture: bool = False

    def to_json(self) -> str:
        data = asdict(self)
        data["requests"] = [base64.b64encode(request).decode() for request in self.requests]
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        data = json.loads(text)
        data["requests"] = tuple(base64.b64decode(request) for request in data["requests"])
        return cls(**data)


@dataclass(frozen=True)
class Outcome:
    """What came back within the window: latencies in seconds of the answers with status 200.

    `client_cpu` is the CPU time of this process as a share of one core; `served` counts all
    answers, those outside the window included, and `server_cpu` is the server's CPU time in
    seconds for each of them, if whoever started the server measured it.
    """

    seconds: float
    answered: int
    failed: int
    p50: float
    p99: float
    client_cpu: float
    served: int = 0
    server_cpu: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    bodies: tuple[str, ...] = ()

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answered / self.seconds


class _Run:
    """The state that all connections share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.latencies = array("d")
        self.served = 0
        self.statuses: dict[str, int] = {}
        self.bodies: dict[int, bytes] = {}
        self.begin = self.end = 0.0
        self.next = 0
        self.done = asyncio.get_running_loop().create_future()

    def take(self) -> tuple[int, bytes]:
        index = self.next % len(self.plan.requests)
        self.next += 1
        return index, self.plan.requests[index]

    def finished(self, sent: float, status: int, index: int, body: list[bytes]) -> bool:
        """Record an answer; whether the connection goes on."""
        now = time.perf_counter()
        self.served += 1
        if self.plan.capture:
            self._count(status)
            self.bodies[index] = b"".join(body)
            if len(self.bodies) == len(self.plan.requests) and not self.done.done():
                self.done.set_result(None)
            return not self.done.done()
        if self.begin <= now < self.end:
            self._count(status)
            if status == 200:
                self.latencies.append(now - sent)
        return now < self.end

    def _count(self, status: int | str) -> None:
        key = str(status)
        self.statuses[key] = self.statuses.get(key, 0) + 1

    def broken(self, why: str) -> None:
        if time.perf_counter() < self.end or self.plan.capture:
            self._count(why)
        if self.plan.capture and not self.done.done():
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._capture = run.plan.capture
        self._body: list[bytes] = []
        self._index = 0
        self._sent = 0.0
        self._waiting = False
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._index, request = self._run.take()
        self._waiting = True
        self._sent = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self._capture:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._waiting = False
        status = self._parser.get_status_code()
        if not self._run.finished(self._sent, status, self._index, self._body):
            self._transport.close()
        elif self._parser.should_keep_alive():
            self._body = []
            self._send()
        else:
            self._transport.close()
            _reconnect(self._run)

    def connection_lost(self, error: Exception | None) -> None:
        if self._waiting:
            self._run.broken("connection lost")
            if time.perf_counter() < self._run.end:
                _reconnect(self._run)


def _reconnect(run: _Run) -> None:
    task = asyncio.ensure_future(_connect(run))
    _TASKS.add(task)
    task.add_done_callback(_TASKS.discard)


_TASKS: set[asyncio.Task[None]] = set()


async def _connect(run: _Run) -> None:
    loop = asyncio.get_running_loop()
    try:
        await loop.create_connection(lambda: _Connection(run), run.plan.host, run.plan.port)
    except OSError as error:
        run.broken(type(error).__name__)
        await asyncio.sleep(0.05)
        if time.perf_counter() < run.end and not run.plan.capture:
            _reconnect(run)


async def _load(plan: Plan) -> Outcome:
    run = _Run(plan)
    run.begin = time.perf_counter() + plan.warm_seconds
    run.end = run.begin + plan.seconds
    await asyncio.gather(*(_connect(run) for _ in range(plan.concurrency)))
    if plan.capture:
        await asyncio.wait_for(run.done, STRAGGLERS_SECONDS)
        cpu = 0.0
    else:
        await asyncio.sleep(plan.warm_seconds)
        before = time.process_time()
        await asyncio.sleep(max(0.0, run.end - time.perf_counter()))
        cpu = (time.process_time() - before) / plan.seconds
    ordered = sorted(run.latencies)
    failed = sum(run.statuses.values()) - run.statuses.get("200", 0)
    return Outcome(
        seconds=plan.seconds,
        answered=len(ordered),
        failed=failed,
        p50=_quantile(ordered, 0.50),
        p99=_quantile(ordered, 0.99),
        client_cpu=cpu,
        served=run.served,
        statuses=run.statuses,
        bodies=tuple(base64.b64encode(body).decode() for _, body in sorted(run.bodies.items())),
    )


def _quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed; 0 without values."""
    if not ordered:
        return 0.0
    rank = min(len(ordered) - 1, max(0, -(-len(ordered) * share // 1) - 1))
    return ordered[int(rank)]


def main() -> int:
    """Read a plan from standard input, load, print the outcome as JSON."""
    plan = Plan.from_json(sys.stdin.read())
    outcome = uvloop.run(_load(plan))
    json.dump(asdict(outcome), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
