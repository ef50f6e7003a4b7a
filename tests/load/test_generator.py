"""The generator counts what a service really answers; here the answers are known."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.load.offer import offer

ASK = b"POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
OTHER = ASK.replace(b"/ask", b"/other")
FULL = b'{"code":"queue_full"}'

Reply = Callable[[bytes, int], list[bytes]]
"""The pieces in which the nth request (of its path) is answered; none ends the connection."""


def answer(status: int, body: bytes = b"", headers: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n%b\r\n" % (status, len(body), headers)
    return head + body


@contextmanager
def answering(reply: Reply) -> Iterator[str]:
    """The address of a server that is always alive, and answers anything else as `reply` says."""
    counts = {b"/ask": 0, b"/other": 0}
    lock = threading.Lock()

    def serve(connection: socket.socket) -> None:
        with connection:
            while request := connection.recv(65536):
                path = request.split(b" ")[1]
                if path == b"/health/live":
                    connection.sendall(answer(200))
                    continue
                with lock:
                    number = counts[path]
                    counts[path] += 1
                pieces = reply(path, number)
                if not pieces:
                    return
                for piece in pieces:
                    connection.sendall(piece)

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def test_a_rate_is_kept_and_every_answer_is_counted() -> None:
    replies = [
        [answer(200, b"yes")],
        [answer(429, FULL, b"Retry-After: 1\r\n")],
        [answer(429, FULL)],  # odd: when to come back is not said
        [answer(429, b'{"code":"rate_limited"}', b"Retry-After: 1\r\n")],  # odd: another code
        [answer(500, b"no")[:30], answer(500, b"no")[30:]],
        [],
    ]
    with answering(lambda _path, number: replies[number % len(replies)]) as url:
        outcome = offer(url, ASK, seconds=1.2, rate=100.0, connections=8)
    assert outcome.sent == 120
    assert outcome.statuses == {"200": 20, "429": 60, "500": 20, "0": 20}
    assert outcome.odd == 40
    assert outcome.late == 0
    assert len(outcome.answered) == 20
    assert len(outcome.refused) == 60
    assert len(outcome.health) > 10
    assert max(outcome.health) < float("inf")


def test_callers_ask_again_once_they_are_answered_and_every_third_asks_for_something_else() -> None:
    def reply(path: bytes, _number: int) -> list[bytes]:
        return [answer(200 if path == b"/ask" else 503)]

    with answering(reply) as url:
        outcome = offer(url, ASK, seconds=0.5, connections=2, other=OTHER, every=3)
    assert set(outcome.statuses) == {"200"}
    assert set(outcome.others) == {"503"}
    assert outcome.others["503"] == outcome.sent // 3
    assert outcome.statuses["200"] + outcome.others["503"] == outcome.sent
    assert outcome.rate <= outcome.statuses["200"] / 0.5


def test_a_request_that_finds_no_free_connection_is_late() -> None:
    held = threading.Event()

    def reply(_path: bytes, _number: int) -> list[bytes]:
        held.wait(1.0)
        return [answer(200)]

    with answering(reply) as url:
        outcome = offer(url, ASK, seconds=0.5, rate=50.0, connections=2)
    assert outcome.sent == 2
    assert outcome.late == 23
    assert outcome.rate == 0
    assert min(outcome.answered) > 0.5
