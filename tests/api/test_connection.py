"""What a client can hold without paying for it: heads, bodies, answers, connections.

Real sockets against a service whose limits are small; beside each refusal the same thing just
within the limit, which passes.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.api.conftest import put_tiny
from tests.api.raw import answer, connected, ended, head
from tests.running import RunningServer, eventually

Guarded = tuple[RunningServer, dict[str, str]]
LIVE = "/health/live"
OCTETS = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def admin(guarded: Guarded) -> Iterator[httpx.Client]:
    server, keys = guarded
    headers = {"Authorization": f"Bearer {keys['admin']}"}
    with httpx.Client(base_url=server.url, timeout=120, headers=headers) as client:
        yield client


def asked(url: str, data: bytes) -> tuple[int, str | None]:
    """Status and code of the answer to bytes on a connection of their own."""
    with connected(url) as connection:
        connection.sendall(data)
        status, headers, body = answer(connection)
        if status >= 400:
            assert headers["content-type"] == "application/problem+json"
            assert headers["x-content-type-options"] == "nosniff"
            assert body["status"] == status
        return status, body.get("code")


def test_a_head_has_a_size(guarded: Guarded) -> None:
    url = guarded[0].url
    assert asked(url, head("GET", LIVE, X_Filler="a" * 3500))[0] == 200
    assert asked(url, head("GET", LIVE, X_Filler="a" * 4100)) == (431, "head_too_large")
    endless = b"GET / HTTP/1.1\r\nX-Endless: " + b"a" * 100_000
    assert asked(url, endless) == (431, "head_too_large")


def test_headers_have_a_number(guarded: Guarded) -> None:
    url = guarded[0].url
    assert asked(url, head("GET", LIVE, **{f"X_{n}": "a" for n in range(28)}))[0] == 200
    many = head("GET", LIVE, **{f"X_{n}": "a" for n in range(31)})
    assert asked(url, many) == (431, "head_too_large")


def test_an_address_has_a_length(guarded: Guarded) -> None:
    url = guarded[0].url
    assert asked(url, head("GET", LIVE + "?" + "a" * 1480))[0] == 200
    assert asked(url, head("GET", LIVE + "?" + "a" * 1500)) == (414, "url_too_long")


@pytest.mark.parametrize(
    "data", [b"\0\1\2\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nBad\r\n\r\n"]
)
def test_what_is_no_http_is_a_problem_too(guarded: Guarded, data: bytes) -> None:
    assert asked(guarded[0].url, data) == (400, "malformed_request")


def trickle(connection: socket.socket, piece: bytes, pause: float) -> tuple[int, str, float]:
    """Send pieces until an answer comes; its status and code, and the seconds it took."""
    started = time.monotonic()
    while time.monotonic() - started < 20:
        connection.sendall(piece)
        connection.settimeout(pause)
        try:
            connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        connection.settimeout(20)
        status, _, body = answer(connection)
        return status, body["code"], time.monotonic() - started
    raise AssertionError("no answer")


def test_a_trickled_head_is_given_up(guarded: Guarded) -> None:
    with connected(guarded[0].url) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
        status, code, seconds = trickle(connection, b"X-A: b\r\n", 0.2)
    assert (status, code) == (408, "request_stalled")
    assert 0.8 < seconds < 15


def test_a_silent_connection_is_closed_and_an_idle_one_kept(guarded: Guarded) -> None:
    with connected(guarded[0].url) as silent, connected(guarded[0].url) as blank:
        started = time.monotonic()
        blank.sendall(b"\r\n\r\n")  # empty lines are no request
        assert ended(silent, 15)
        assert ended(blank, 15)
        assert time.monotonic() - started > 0.8
    with connected(guarded[0].url) as used:
        used.sendall(head("GET", LIVE))
        assert answer(used)[0] == 200
        time.sleep(1.5)  # beyond what a head may take: that clock has not begun
        used.sendall(head("GET", LIVE))
        assert answer(used)[0] == 200


@pytest.mark.parametrize("path", ["/v1/models/slow/versions", "/v1/models/trickled/predict"])
def test_a_trickled_body_is_given_up(admin: httpx.Client, guarded: Guarded, path: str) -> None:
    """A byte now and then is never silent for a second; what counts is the rate."""
    kind = "application/octet-stream"
    if path.endswith("predict"):
        put_tiny(admin, "trickled")
        kind = "image/png"
    bearer = admin.headers["authorization"]
    start = head("POST", path, Authorization=bearer, Content_Type=kind, Content_Length="1000000")
    with connected(guarded[0].url) as connection:
        connection.sendall(start)
        status, code, seconds = trickle(connection, b"x", 0.1)
    assert (status, code) == (408, "request_stalled")
    assert 0.8 < seconds < 15


def test_a_slow_body_above_the_rate_is_taken(admin: httpx.Client, guarded: Guarded) -> None:
    bearer = admin.headers["authorization"]
    start = head(
        "POST", "/v1/models/steady/versions",
        Authorization=bearer, Content_Type=OCTETS["Content-Type"], Content_Length="150000",
    )  # fmt: skip
    with connected(guarded[0].url) as connection:
        connection.sendall(start)
        for _ in range(30):  # 2.2 s at 65 kB/s
            connection.sendall(b"x" * 5000)
            time.sleep(0.075)
        assert answer(connection)[0] == 202


def test_the_parts_of_a_form_are_counted(admin: httpx.Client) -> None:
    predict = "/v1/models/trickled/predict"
    images = [("image", ("x.png", b"x", "image/png"))] * 5
    assert "4 parts" in admin.post(predict, files=images).json()["detail"]
    assert "cannot be decoded" in admin.post(predict, files=images[:4]).json()["detail"]
    url = "/v1/models/parts/versions"
    long = admin.post(url, files={"checkpoint": ("a" * 400, b"x")})
    assert "300 bytes" in long.json()["detail"]
    assert admin.post(url, files={"checkpoint": ("a" * 100, b"x")}).status_code == 202


def test_a_client_that_never_reads_is_cut_off(admin: httpx.Client, guarded: Guarded) -> None:
    """Eight answers of 12 MB that nobody takes; each holds a file and a task until it is cut."""
    server, size = guarded[0], 12_000_000
    bearer = admin.headers["authorization"]
    version = admin.post("/v1/models/large/versions", content=bytes(size), headers=OCTETS).json()
    path = version["links"]["train"]

    def given_up() -> int:
        return sum(line.get("path") == path for line in server.log())

    before = given_up()
    with contextlib.ExitStack() as stack:
        deaf = [stack.enter_context(connected(server.url, 4096)) for _ in range(8)]
        for connection in deaf:
            connection.sendall(head("GET", path, Authorization=bearer))
        blob = version["checkpoint"]["sha256"]
        eventually(lambda: given_up() == before + 8, "the answers are given up")
        eventually(lambda: server.opened(blob) == 0, "the file is closed")
        assert all(ended(connection) for connection in deaf)
    # The control: whoever reads, slowly but steadily, gets all of it.
    with connected(server.url, 4096) as slow:
        slow.sendall(head("GET", path, Authorization=bearer, Connection="close"))
        taken, begun = 0, time.monotonic()
        while piece := slow.recv(200_000):
            taken += len(piece)
            time.sleep(0.01 if time.monotonic() - begun < 2.5 else 0)
        assert taken > size


def test_an_early_refusal_does_not_wait_for_the_body(guarded: Guarded) -> None:
    """The answer comes at once; whoever goes on sending slowly is cut off soon after."""
    start = head("POST", "/v1/models/m/versions", Content_Length="1000000000")
    with connected(guarded[0].url) as connection:
        connection.sendall(start + b"x" * 1000)
        status, _, body = answer(connection)
        assert (status, body["code"]) == (401, "unauthorized")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 40:
                connection.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - started < 35


def test_connections_are_bounded(guarded: Guarded) -> None:
    url = guarded[0].url
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(url)) for _ in range(40)]
        with connected(url) as one_more:
            status, headers, body = answer(one_more)
        assert (status, body["code"]) == (503, "too_many_connections")
        assert headers["retry-after"] == "1"
        held[0].sendall(head("GET", LIVE))
        assert answer(held[0])[0] == 200
    deadline = time.monotonic() + 10
    while asked(url, head("GET", LIVE))[0] != 200:
        assert time.monotonic() < deadline
