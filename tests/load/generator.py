"""The process that offers load: sockets and one loop, so that it takes little of the machine.

    python -m tests.load.generator < plan.json > outcome.json

It shares the cores with the service that is measured, and what is spent here is missing there. So
there are no tasks, no futures and no library that parses HTTP: an answer has a status line, a head
and as many bytes as its Content-Length says.
"""

from __future__ import annotations

import base64
import json
import select
import socket
import sys
import time
from collections import Counter
from typing import Any, Literal

_HEALTH = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"
_HEALTH_SECONDS = 0.02
_STRAGGLERS_SECONDS = 60.0
_PIECE = 1 << 18

Kind = Literal["request", "other", "health"]
Answer = tuple[int, bytes, bytes]
"""Status, head in lower case, body; the status is 0 where the connection ended instead."""


class _Wire:
    """One connection, and the request that is under way on it: its kind, and when it was due."""

    __slots__ = (
        "_address", "_blocked", "_poll", "_received", "_size", "_socket", "_unsent", "_wires",
        "due", "kind",
    )  # fmt: skip

    def __init__(
        self, address: tuple[str, int], poll: select.epoll, wires: dict[int, _Wire]
    ) -> None:
        """While it is open it is known to `poll`, and in `wires` by its descriptor."""
        self._address, self._poll, self._wires = address, poll, wires
        self.kind: Kind = "request"
        self.due = 0.0
        self._connect()

    def ask(self, request: bytes, kind: Kind, due: float) -> None:
        """Send a request, on a new connection if the service has closed this one."""
        if self._socket.fileno() < 0:
            self._connect()
        self.kind, self.due = kind, due
        self._received, self._size = b"", 0
        self._unsent = memoryview(request)
        self._send()

    def on_event(self, event: int) -> Answer | None:
        """What `select.epoll` says of the socket; an answer once it is whole."""
        if event & select.EPOLLOUT:
            self._send()
        if event == select.EPOLLOUT:
            return None
        try:
            data = self._socket.recv(_PIECE)
        except BlockingIOError:
            return None
        except ConnectionError:
            data = b""
        if not data:
            del self._wires[self._socket.fileno()]
            self._socket.close()  # and leaves `poll` by that
            return 0, b"", b""
        self._received += data
        if not self._size and (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = self._received[:end].lower().partition(b"\r\ncontent-length:")[2]
            self._size = end + 4 + int(length.partition(b"\r\n")[0])
        if not self._size or len(self._received) < self._size:
            return None
        assert len(self._received) == self._size, "more than one answer came"
        head, _, body = self._received.partition(b"\r\n\r\n")
        return int(head[9:12]), head.lower(), body

    def _connect(self) -> None:
        self._socket = socket.create_connection(self._address)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._blocked = False
        self._poll.register(self._socket, select.EPOLLIN)
        self._wires[self._socket.fileno()] = self

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except ConnectionError:
            return  # its end is read like that of any connection
        if self._blocked != bool(self._unsent):
            self._blocked = not self._blocked
            also = select.EPOLLOUT if self._blocked else 0
            self._poll.modify(self._socket, select.EPOLLIN | also)


class _Load:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.seconds: float = plan["seconds"]
        self.rate: float = plan.get("rate", 0.0)
        self.every: int = plan.get("every", 0)
        self.request = base64.b64decode(plan["request"])
        self.other = base64.b64decode(plan["other"])
        self.statuses: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.health: list[float] = []
        self.odd = self.late = self.sent = self.done = 0
        address = (plan["host"], plan["port"])
        self.poll = select.epoll()
        self.wires: dict[int, _Wire] = {}
        self.idle = [self._wire(address) for _ in range(plan.get("connections", 8))]
        self.watch = self._wire(address)
        self.busy: set[_Wire] = set()
        self.began = self.health_due = time.perf_counter()
        self.end = self.began + self.seconds

    def _wire(self, address: tuple[str, int]) -> _Wire:
        return _Wire(address, self.poll, self.wires)

    def run(self) -> dict[str, Any]:
        """Offer the load until its time is over; then wait a while for what is under way."""
        give_up = self.end + _STRAGGLERS_SECONDS
        if not self.rate:
            for wire in [self.idle.pop() for _ in range(len(self.idle))]:
                self.ask(wire, self.began)
        count = 0
        while (now := time.perf_counter()) < self.end or (self.busy and now < give_up):
            wake = self.end if now < self.end else give_up
            if self.rate:
                while (due := self.began + count / self.rate) <= now and due < self.end:
                    count += 1
                    self.ask_any(due)
                wake = min(wake, due) if due < self.end else wake
            if self.watch not in self.busy and now < self.end:
                if self.health_due <= now:
                    self.send(self.watch, _HEALTH, "health", now)
                else:
                    wake = min(wake, self.health_due)
            for descriptor, event in self.poll.poll(max(0.0, wake - time.perf_counter())):
                wire = self.wires[descriptor]
                answer = wire.on_event(event)
                if answer is not None and wire in self.busy:
                    self.take(wire, answer, time.perf_counter())
        return {
            "seconds": self.seconds,
            "sent": self.sent,
            "rate": self.done / self.seconds,
            "statuses": self.statuses,
            "odd": self.odd,
            "late": self.late,
            "answered": sorted(self.answered),
            "refused": sorted(self.refused),
            "health": sorted(self.health),
            "others": self.others,
        }

    def ask_any(self, due: float) -> None:
        """Send the next request on a connection that is free, if there is one."""
        if self.idle:
            self.ask(self.idle.pop(), due)
        else:
            self.late += 1

    def ask(self, wire: _Wire, due: float) -> None:
        """Send the next request."""
        self.sent += 1
        if self.every and self.sent % self.every == 0:
            self.send(wire, self.other, "other", due)
        else:
            self.send(wire, self.request, "request", due)

    def send(self, wire: _Wire, request: bytes, kind: Kind, due: float) -> None:
        self.busy.add(wire)
        wire.ask(request, kind, due)

    def take(self, wire: _Wire, answer: Answer, now: float) -> None:
        """Count an answer, and use its connection again."""
        self.busy.discard(wire)
        status, head, body = answer
        seconds = now - wire.due
        if wire.kind == "health":
            self.health.append(seconds if status == 200 else float("inf"))
            self.health_due = now + _HEALTH_SECONDS
            return
        if wire.kind == "other":
            self.others[str(status)] += 1
        else:
            self.statuses[str(status)] += 1
            if status == 200:
                self.answered.append(seconds)
                self.done += now <= self.end
            elif status == 429:
                self.refused.append(seconds)
                right = b"\r\nretry-after:" in head and b'"queue_full"' in body
                self.odd += not right
        if self.rate:
            self.idle.append(wire)
        elif now < self.end:
            self.ask(wire, now)


if __name__ == "__main__":
    json.dump(_Load(json.load(sys.stdin)).run(), sys.stdout)
