from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.api import tiny
from tests.api.conftest import put_tiny
from tests.api.problem import problem
from tests.running import RunningServer, running

MIB = 2**20
OCTETS = {"Content-Type": "application/octet-stream"}


def wait_final(http: httpx.Client, location: str) -> dict[str, object]:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        body: dict[str, object] = http.get(location).json()
        if body["state"] in ("ready", "rejected"):
            return body
        time.sleep(0.05)
    raise AssertionError(f"{location} did not end: {body}")


def test_multipart_is_queued_and_becomes_ready(http: httpx.Client) -> None:
    data = tiny.checkpoint()
    answer = http.post(
        "/v1/models/up-multipart/versions",
        files={"checkpoint": ("my net.pth", data)},
        data={"config": json.dumps(tiny.CONFIG)},
    )
    assert answer.status_code == 202
    location = answer.headers["location"]
    assert location == "/v1/models/up-multipart/versions/1"
    assert answer.json()["state"] in ("queued", "converting")
    version = wait_final(http, location)
    assert version["state"] == "ready"
    assert version["error"] is None
    assert version["default"] is True
    assert version["checkpoint"] == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "form": "train",
        "filename": "my net.pth",
    }


def test_raw_with_config_waits_and_answers_201(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/models/up-raw/versions",
        params={"config": json.dumps(tiny.CONFIG), "filename": "raw.pth"},
        content=tiny.checkpoint(),
        headers=OCTETS | {"Prefer": "respond-async, wait=100"},
    )
    assert answer.status_code == 201, answer.text
    assert answer.headers["preference-applied"] == "wait=100"
    assert answer.headers["location"] == "/v1/models/up-raw/versions/1"
    body = answer.json()
    assert body["state"] == "ready"
    assert body["checkpoint"]["filename"] == "raw.pth"
    architecture, fusion = body["architecture"], body["fusion"]
    assert architecture["family"] == "repvgg"
    assert architecture["num_classes"] == tiny.CLASSES
    assert architecture["input_shape"] == list(tiny.SHAPE)
    assert fusion["fused"] == fusion["blocks"] == 5
    assert (fusion["convolutions_before"], fusion["convolutions_after"]) == (10, 5)
    assert 0 < fusion["error_float64"] < 1e-12
    assert 0 < fusion["error_end_to_end"] < 1e-3


def test_the_same_bytes_are_one_blob_and_two_versions(http: httpx.Client) -> None:
    first, second = (
        http.post("/v1/models/up-twice/versions", content=b"no checkpoint", headers=OCTETS)
        for _ in range(2)
    )
    assert [first.json()["version"], second.json()["version"]] == [1, 2]
    assert first.json()["checkpoint"]["sha256"] == second.json()["checkpoint"]["sha256"]


def test_a_wait_of_nothing_answers_202_at_once(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/models/up-nowait/versions",
        content=tiny.checkpoint(),
        headers=OCTETS | {"Prefer": "wait=0"},
    )
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "wait=0"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "image/png"])
def test_other_types_are_refused(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/models/m/versions", content=b"x", headers={"Content-Type": kind})
    body = problem(answer, 415, "unsupported_media_type")
    assert kind in body["detail"]


@pytest.mark.parametrize("name", ["Upper", "-dash", "a" * 64, "sp%20ace", "%2e%2e", "ünï"])
def test_bad_names_are_refused(http: httpx.Client, name: str) -> None:
    answer = http.post(f"/v1/models/{name}/versions", content=b"x", headers=OCTETS)
    problem(answer, 422, "name_invalid")


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "JSON"),
        ('{"lables": []}', "lables"),
        ('{"weights": "best"}', "weights"),
        ('{"input_shape": [3, 0, 4]}', "input_shape"),
        ('{"backend": "abacus"}', "abacus"),
        ("[]", "config"),
    ],
)
def test_a_bad_config_is_refused_before_the_file_is_stored(
    http: httpx.Client, config: str, word: str
) -> None:
    url = "/v1/models/up-config/versions"
    raw = http.post(url, params={"config": config}, content=b"x", headers=OCTETS)
    assert word in problem(raw, 422, "invalid_config")["detail"]
    form = http.post(url, files={"checkpoint": b"x"}, data={"config": config})
    assert word in problem(form, 422, "invalid_config")["detail"]
    problem(http.get("/v1/models/up-config"), 404, "model_not_found")


def test_a_form_without_checkpoint_or_with_strange_fields_is_refused(http: httpx.Client) -> None:
    url = "/v1/models/up-form/versions"
    answer = http.post(url, files={"config": (None, "{}")})
    assert "checkpoint" in problem(answer, 422, "bad_input")["detail"]
    answer = http.post(url, files={"checkpoint": b"x", "other": b"y"})
    assert "other" in problem(answer, 422, "bad_input")["detail"]
    answer = http.post(url, files=[("checkpoint", b"x"), ("checkpoint", b"y")])
    assert "checkpoint" in problem(answer, 422, "bad_input")["detail"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "multipart/form-data; boundary=b"),
        (b"garbage", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data; name=checkpoint\r\n\r\nx",
         "multipart/form-data; boundary=b"),
        (b"--b--", "multipart/form-data"),
        (b"--b\r\n" + b"X" * 9000 + b": y\r\n\r\n\r\n--b--", "multipart/form-data; boundary=b"),
    ],
)  # fmt: skip
def test_a_malformed_form_is_refused(http: httpx.Client, content: bytes, kind: str) -> None:
    url = "/v1/models/up-malformed/versions"
    answer = http.post(url, content=content, headers={"Content-Type": kind})
    problem(answer, 422, "bad_input")


def test_too_large_is_refused_by_its_head_and_while_it_streams(small: httpx.Client) -> None:
    url = "/v1/models/big/versions"
    body = problem(small.post(url, content=bytes(300_001), headers=OCTETS), 413, "upload_too_large")
    assert body["limit"] == 300_000
    assert "FOLDSERVE_MAX_UPLOAD_BYTES" in body["remedy"]

    def pieces() -> Iterator[bytes]:
        for _ in range(31):
            yield bytes(10_000)

    answer = small.post(url, content=pieces(), headers=OCTETS)
    assert "content-length" not in answer.request.headers
    problem(answer, 413, "upload_too_large")
    problem(small.post(url, files={"checkpoint": bytes(300_001)}), 413, "upload_too_large")
    problem(small.get("/v1/models/big"), 404, "model_not_found")
    # The control: one byte less is taken.
    assert small.post(url, content=bytes(300_000), headers=OCTETS).status_code == 202


def test_nothing_of_a_refused_upload_is_left(
    small: httpx.Client, small_server: RunningServer
) -> None:
    small.post("/v1/models/big/versions", content=bytes(300_001), headers=OCTETS)
    small.post("/v1/models/big/versions", files={"checkpoint": bytes(300_001)})
    assert list((small_server.data_dir / "blobs" / "temporary").iterdir()) == []


def test_a_large_config_is_refused(small: httpx.Client) -> None:
    config = json.dumps({"labels": ["x" * 200]})
    answer = small.post(
        "/v1/models/m/versions", files={"checkpoint": b"x"}, data={"config": config}
    )
    assert "FOLDSERVE_MAX_CONFIG_BYTES" in problem(answer, 422, "invalid_config")["remedy"]


def test_a_stalled_upload_is_given_up(small_server: RunningServer) -> None:
    host, port = small_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/models/slow/versions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            b"Content-Type: application/octet-stream\r\n\r\nonly this"
        )
        started = time.monotonic()
        answer = connection.recv(65536)
        while b"}" not in answer and (more := connection.recv(65536)):
            answer += more  # head and body may come apart
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_stalled"' in answer
    assert 0.4 < time.monotonic() - started < 10


def test_a_client_that_leaves_leaves_nothing(
    small: httpx.Client, small_server: RunningServer
) -> None:
    host, port = small_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/models/gone/versions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            b"Content-Type: application/octet-stream\r\n\r\nonly this"
        )
        time.sleep(0.1)
    time.sleep(0.3)
    assert list((small_server.data_dir / "blobs" / "temporary").iterdir()) == []
    problem(small.get("/v1/models/gone"), 404, "model_not_found")


class _Watch:
    """The most memory that a server had while this was open, above what it had before."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._before = self._most = server.resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, self._server.resident_bytes())

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self._most - self._before


@pytest.mark.parametrize("multipart", [False, True])
def test_memory_hardly_grows_while_half_a_gigabyte_arrives(tmp_path: Path, multipart: bool) -> None:
    """On a server of its own: elsewhere a model of another test may be loading meanwhile."""
    size, piece = 500 * MIB, bytes(MIB)

    def pieces() -> Iterator[bytes]:
        if multipart:
            yield b'--b\r\nContent-Disposition: form-data; name="checkpoint"; filename="x"\r\n\r\n'
        for _ in range(size // MIB):
            yield piece
        if multipart:
            yield b"\r\n--b--\r\n"

    kind = "multipart/form-data; boundary=b" if multipart else "application/octet-stream"
    with (
        running(tmp_path / "data") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        with _Watch(server) as watch:
            answer = http.post(
                "/v1/models/heavy/versions", content=pieces(), headers={"Content-Type": kind}
            )
        assert answer.status_code == 202, answer.text
        assert answer.json()["checkpoint"]["bytes"] == size
        assert watch.growth < 64 * MIB, f"{watch.growth / MIB:.0f} MiB"


def test_the_watch_sees_memory_that_grows(tmp_path: Path) -> None:
    """The control, on a server of its own too: one that was large before need not grow."""
    body = tiny.npy(tiny.rows(40_000))  # 123 MB, and a prediction holds its whole body
    with (
        running(tmp_path / "data") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        put_tiny(http, "tiny")
        with _Watch(server) as watch:
            answer = http.post(
                "/v1/models/tiny/predict", content=body, headers={"Content-Type": tiny.NPY}
            )
        problem(answer, 422, "bad_input")
        assert watch.growth > 64 * MIB


def refuse_oversized(http: httpx.Client, count: int) -> None:
    """Uploads of 310 kB where 300 kB are allowed, each third in another form."""
    url, body = "/v1/models/oversized/versions", bytes(310_000)

    def pieces() -> Iterator[bytes]:
        for _ in range(31):
            yield body[:10_000]

    for n in range(count):
        if n % 3 == 0:
            answer = http.post(url, content=body, headers=OCTETS)
        elif n % 3 == 1:
            answer = http.post(url, content=pieces(), headers=OCTETS)
        else:
            answer = http.post(url, files={"checkpoint": body})
        problem(answer, 413, "upload_too_large")


def test_a_hundred_oversized_uploads_leave_no_memory_behind(
    small: httpx.Client, small_server: RunningServer
) -> None:
    """A leak is there in every round; pools and buffers that come to their size are not.

    The control is the watch above, which sees a body that is held.
    """
    growth: list[int] = []
    descriptors = small_server.descriptors()
    while len(growth) < 5 and min(growth, default=10**9) >= 1_000_000:
        before = small_server.resident_bytes()
        refuse_oversized(small, 100)
        growth.append(small_server.resident_bytes() - before)
    assert growth[-1] < 1_000_000, growth
    assert small_server.descriptors() <= descriptors + 1
