"""Real HTTP through real front processes to an application that tells what reached it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.api import raw
from tests.relay.device import CONNECTIONS, PIECE
from tests.running import ROOT, eventually

MIB = 1 << 20
SHARED = 8 * MIB


@dataclass(frozen=True)
class Device:
    """The process that holds the application, and where its fronts answer."""

    process: subprocess.Popen[str]
    url: str

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/seen").json()
        return found


@contextmanager
def device(processes: int) -> Iterator[Device]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("FOLDSERVE_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.relay.device", str(processes), str(SHARED)],
        cwd=ROOT,
        env=own,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        started = json.loads(process.stdout.readline())
        yield Device(process, f"http://127.0.0.1:{started['port']}")
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Device]:
    """Two fronts with 8 MiB each. Not to be ended."""
    with device(2) as running:
        yield running


@pytest.fixture
def client(two: Device) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=two.url, timeout=30) as made:
        yield made


def data(size: int) -> bytes:
    return (b"%015d\n" % size * (size // 16 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, 30_000, 100_000, 3 * MIB, 5 * MIB, 20 * MIB])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_arrive_whole(client: httpx.Client, size: int, chunked: bool) -> None:
    sent = data(size)
    pieces = (sent[at : at + 70_000] for at in range(0, size, 70_000))
    told = client.post("/echo", content=pieces if chunked else sent).json()
    assert (told["size"], told["sha256"]) == (size, hashlib.sha256(sent).hexdigest())
    assert set(told["kinds"]) == {"bytes"}, "the standard's type, unless the application asks"


def test_a_body_that_fits_is_one_view_and_its_place_is_used_again(client: httpx.Client) -> None:
    # Ten times what the memory holds: if places were not given back, they would be pieces soon.
    sent = data(3 * MIB)
    for _ in range(2 * 10 * SHARED // len(sent)):
        told = client.post("/echo?views=1", content=sent).json()
        assert told["kinds"] == ["memoryview"]
        assert told["sha256"] == hashlib.sha256(sent).hexdigest()
    larger = client.post("/echo?views=1", content=data(20 * MIB)).json()
    assert len(larger["kinds"]) > 1, "a body beyond the memory is not held whole"


def test_more_bodies_than_the_memory_holds(two: Device) -> None:
    right = []

    def send(number: int) -> None:
        sent = data(3 * MIB + number)
        told = httpx.post(f"{two.url}/echo?views=1&pause=0.2", content=sent, timeout=30).json()
        right.append(told["sha256"] == hashlib.sha256(sent).hexdigest())

    threads = [threading.Thread(target=send, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 10


def test_the_scope_is_what_the_client_sent(client: httpx.Client) -> None:
    told = client.put("/%65cho?a=%20b&c", headers={"X-Name": "value", "x-two": "1"}).json()
    assert (told["method"], told["path"], told["raw_path"]) == ("PUT", "/echo", "/%65cho")
    assert (told["query"], told["http_version"]) == ("a=%20b&c", "1.1")
    assert [h for h in told["head"] if h[0][:2] == "x-"] == [["x-name", "value"], ["x-two", "1"]]
    assert told["client"][0] == "127.0.0.1"


def test_headers_of_the_answer_come_back(client: httpx.Client) -> None:
    answer = client.get("/seen")
    assert (b"x-test", b"caf\xe9") in [(n.lower(), v) for n, v in answer.headers.raw]
    assert "date" in answer.headers


def test_a_slow_body_is_told_of_while_it_comes(two: Device) -> None:
    """Or the application could not tell a slow client from one that stalls."""
    size = 200_000
    with raw.connected(two.url) as connection:
        connection.sendall(raw.head("POST", "/echo?views=1", content_length=str(size)))
        for _ in range(4):
            connection.sendall(b"x" * (size // 4))
            time.sleep(0.4)
        _, _, told = raw.answer(connection)
    assert told["size"] == size
    assert len(told["kinds"]) >= 2


def test_an_expecting_client_is_not_told_to_go_on_before_it_is_refused(two: Device) -> None:
    for path, first in (("/refuse", b"HTTP/1.1 413"), ("/echo", b"HTTP/1.1 100")):
        with raw.connected(two.url) as connection:
            connection.sendall(
                raw.head("POST", path, content_length="100000", Expect="100-continue")
            )
            assert connection.recv(12) == first
            if path == "/echo":
                connection.recv(1000)
                connection.sendall(b"y" * 100_000)
                assert raw.answer(connection)[2]["size"] == 100_000


def test_events_come_one_by_one(two: Device) -> None:
    with httpx.stream("GET", f"{two.url}/ticks", timeout=10) as stream:
        events = stream.iter_bytes()
        assert next(events) == b"data: 1\n\n"  # while the application waits
        httpx.get(f"{two.url}/tick")
        assert next(events) == b"data: 2\n\n"


@pytest.mark.parametrize("how", ["pieces=100", "pieces=100&whole=1"])
def test_a_large_answer_is_whole(client: httpx.Client, how: str) -> None:
    assert client.get(f"/many?{how}").content == PIECE * 100


def test_an_answer_waits_for_its_reader(two: Device) -> None:
    before = two.seen()["sent"]
    with raw.connected(two.url, receive_buffer=65_536) as connection:
        connection.sendall(raw.head("GET", "/many?pieces=1000"))  # 64 MiB
        connection.recv(1000)
        time.sleep(0.5)
        on_the_way = two.seen()["sent"] - before
        assert 0 < on_the_way < 16 * MIB
    eventually(lambda: httpx.get(f"{two.url}/seen").status_code == 200, "others are served")


def test_a_client_that_leaves_is_reported(two: Device) -> None:
    before = two.seen()["departed"]
    for body in (b"", b"z" * 100_000):
        with raw.connected(two.url) as connection:
            connection.sendall(raw.head("POST", "/hold", content_length=str(len(body))) + body)
            time.sleep(0.2)
            assert two.seen()["departed"] == before, "not while it is here"
        before += 1
        eventually(lambda now=before: two.seen()["departed"] == now, "its departure", 10)


def test_an_application_that_fails(two: Device, client: httpx.Client) -> None:
    assert client.get("/fail").status_code == 500
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/cut")
    assert client.get("/seen").status_code == 200


def test_a_connection_is_kept(two: Device) -> None:
    with raw.connected(two.url) as connection:
        for _ in range(3):
            connection.sendall(raw.head("GET", "/seen"))
            assert raw.answer(connection)[0] == 200


def test_connections_are_counted_over_all_fronts(two: Device) -> None:
    def admitted() -> bool:
        with raw.connected(two.url) as one:
            one.sendall(raw.head("GET", "/seen"))
            return raw.answer(one)[0] == 200

    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = stack.enter_context(raw.connected(two.url))
            connection.sendall(raw.head("GET", "/seen"))
            assert raw.answer(connection)[0] == 200
        with raw.connected(two.url) as one_more:
            status, _, body = raw.answer(one_more)
        assert (status, body["code"]) == (503, "too_many_connections")
    eventually(admitted, "when they have left there is room again", 10)


def test_a_killed_front_loses_its_own_connections_only_and_is_replaced() -> None:
    with device(2) as running, ExitStack() as stack:
        killed, left = running.seen()["fronts"]
        idle, held = (
            [stack.enter_context(raw.connected(running.url)) for _ in range(12)] for _ in "ab"
        )
        for connection in idle:
            connection.sendall(raw.head("GET", "/seen"))
            assert raw.answer(connection)[0] == 200
        for connection in held:
            connection.sendall(raw.head("GET", "/hold"))
        time.sleep(0.3)
        assert running.seen()["departed"] == 0
        os.kill(killed, signal.SIGKILL)
        answered = [_still_answers(connection) for connection in idle]
        assert set(answered) == {True, False}, "each front had some, and those of one are gone"
        lost = sum(raw.ended(connection, 0.3) for connection in held)
        assert lost > 0
        eventually(lambda: _seen(running).get("departed") == lost, "the application is told", 10)
        eventually(
            lambda: len(set(_seen(running).get("fronts", ())) - {killed}) == 2, "another", 30
        )
        assert left in running.seen()["fronts"]


def test_when_the_device_process_dies_the_fronts_end() -> None:
    with device(2) as running:
        pids = running.seen()["fronts"]
        assert all(_alive(pid) for pid in pids)
        with raw.connected(running.url) as connection:
            running.process.kill()
            assert raw.ended(connection, 10)
        eventually(lambda: not any(_alive(pid) for pid in pids), "they end", 10)


def test_fronts_take_no_signal_and_drain_when_told() -> None:
    with device(2) as running:
        for pid in running.seen()["fronts"]:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        with raw.connected(running.url) as connection:
            connection.sendall(raw.head("POST", "/echo", content_length="100000"))
            assert running.process.stdin is not None
            running.process.stdin.close()  # which tells it to drain
            time.sleep(1.0)
            connection.sendall(b"w" * 100_000)
            status, _, told = raw.answer(connection)
        assert (status, told["size"]) == (200, 100_000)
        assert running.process.wait(20) == 0


def _still_answers(connection: socket.socket) -> bool:
    try:
        connection.sendall(raw.head("GET", "/seen"))
        return raw.answer(connection)[0] == 200
    except OSError:
        return False


def _seen(running: Device) -> dict[str, Any]:
    """What the device tells; nothing while a connection meets the front that dies."""
    with suppress(httpx.TransportError):
        return running.seen()
    return {}


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
