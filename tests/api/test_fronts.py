"""The service behind two HTTP processes answers as it does behind one, and ends as well."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient import http as triton

from service.api.predict import ARRAYS
from service.api.server import run
from service.settings import Settings
from tests.api import raw, tiny
from tests.api.conftest import put_tiny
from tests.api.test_events import read
from tests.api.v2.conftest import address
from tests.api.v2.test_infer import given, is_right
from tests.machines import small
from tests.machines.test_drain import Load
from tests.running import RunningServer, eventually, running

TWO = {"FOLDSERVE_HTTP_PROCESSES": "2", "FOLDSERVE_MAX_BODY_BYTES": "20000000"}
LARGE = 700
"""Rows of the tiny network that make a body of 2 MB, far too large for one frame of the link."""
_ITS_OWN = {"date", "last-modified", "x-request-id"}


@pytest.fixture(scope="module")
def fronted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A service with two HTTP processes that serves the tiny network as `tiny`."""
    with running(tmp_path_factory.mktemp("fronted") / "data", TWO) as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            put_tiny(client, "tiny")
        yield server


@pytest.fixture
def two(fronted: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fronted.url, timeout=60) as client:
        yield client


def requests(name: str) -> list[tuple[str, str, dict[str, str], bytes]]:
    """Method, path, headers and body of what both services are asked."""
    large, few = tiny.rows(LARGE), tiny.rows(3)
    url = f"/v1/models/{name}/predict"
    npy = {"Content-Type": tiny.NPY, "Accept": tiny.NPY}
    as_json = {"Content-Type": tiny.JSON}
    binary, length = triton.InferenceServerClient.generate_request_body([given(large)])
    v2 = {"Inference-Header-Content-Length": str(length)}
    plain = json.dumps({"inputs": few.tolist()}).encode()
    return [
        ("POST", url, npy, tiny.npy(few)),
        ("POST", url, npy, tiny.npy(large)),
        ("POST", url, as_json, plain),
        ("POST", f"{url}?top_k=2&form=train", as_json, plain),
        ("POST", f"/v2/models/{name}/infer", v2, binary),
        ("POST", url, npy, b"no npy"),
        ("POST", url, {"Content-Type": "text/plain"}, b"x"),
        ("POST", url, npy, bytes(20_000_001)),
        ("POST", url, npy | {"Expect": "100-continue"}, tiny.npy(large)),
        ("GET", f"/v1/models/{name}/versions/1/checkpoints/train", {}, b""),
        ("HEAD", f"/v1/models/{name}/versions/1/checkpoints/train", {}, b""),
        ("GET", "/v1/models/nobody", {}, b""),
        ("DELETE", "/nowhere/%C3%A9?q=%20", {}, b""),
        ("GET", "/v2", {}, b""),
    ]


def test_the_answers_are_those_of_one_process(
    two: httpx.Client, http: httpx.Client, model: str
) -> None:
    """Bytes, status and headers, but for what every answer has of its own."""
    statuses = set()
    for method, path, headers, body in requests(model):
        if len(body) > 20_000_000:  # the other service allows more
            continue
        theirs, ours = (
            client.request(method, path, headers=headers, content=body) for client in (http, two)
        )
        assert ours.status_code == theirs.status_code, path
        assert ours.content == theirs.content, path
        assert _compared(ours) == _compared(theirs), path
        statuses.add(ours.status_code)
    assert {200, 404, 415, 422} <= statuses, "refusals were among them"


def test_repeated_requests_are_answered_as_by_one_process(
    fronted: RunningServer, server: RunningServer, model: str
) -> None:
    """On one connection, head and body in one piece or two: all but the first go in one frame."""
    rows = [tiny.rows(2, seed=seed) for seed in range(3)]
    answers: list[list[Any]] = []
    for url, name in ((server.url, model), (fronted.url, "tiny")):
        with raw.connected(url) as connection:
            got = []
            for number, each in enumerate(rows * 2):
                body = tiny.npy(each)
                head = raw.head(
                    "POST",
                    f"/v1/models/{name}/predict",
                    content_type=tiny.NPY,
                    accept=ARRAYS,
                    content_length=str(len(body)),
                )
                for piece in [head + body] if number % 2 else [head, body]:
                    connection.sendall(piece)
                    time.sleep(0.003)
                got.append(raw.answer(connection)[2])
            answers.append(got)
    by_one, by_two = ([answer["outputs"] for answer in each] for each in answers)
    assert by_one == by_two
    found = [np.array(body["outputs"][0]["data"]) for body in answers[1]]
    for each, output in zip(rows * 2, found, strict=True):
        assert np.abs(output - tiny.expected(each)).max() < 1e-3
    assert np.abs(found[0] - found[1]).max() > 1e-2, "the control: they can be told apart"


def test_what_is_too_large_is_refused_by_the_application(two: httpx.Client) -> None:
    (refused,) = (each for each in requests("tiny") if len(each[3]) > 20_000_000)
    answer = two.request(refused[0], refused[1], headers=refused[2], content=refused[3])
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")


def test_tensors_in_binary(fronted: RunningServer) -> None:
    client = triton.InferenceServerClient(address(fronted))
    for count in (2, LARGE):
        rows = tiny.rows(count, seed=count)
        found = client.infer("tiny", [given(rows)]).as_numpy("output_0")
        assert is_right(found, rows)
        assert not is_right(found, tiny.rows(count, seed=count + 1)), "the control: other rows"


def test_many_at_once_get_their_own_rows(fronted: RunningServer) -> None:
    """Places in the shared memory are used again, but not while somebody computes with them."""
    given_rows = [tiny.rows(120, seed=seed) for seed in range(12)]
    truths = [tiny.expected(rows) for rows in given_rows]
    right: list[bool] = []

    def ask(first: int) -> None:
        with httpx.Client(base_url=fronted.url, timeout=60) as client:
            for turn in range(6):
                number = (first + turn) % len(truths)
                answer = client.post(
                    "/v1/models/tiny/predict",
                    content=tiny.npy(given_rows[number]),
                    headers={"Content-Type": tiny.NPY, "Accept": tiny.NPY},
                )
                found = tiny.from_npy(answer.content)
                right.append(bool(np.abs(found - truths[number]).max() < 1e-3))

    assert np.abs(truths[0] - truths[1]).max() > 1e-1, "the control: they can be told apart"
    threads = [threading.Thread(target=ask, args=(2 * number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 36


def test_an_upload_is_followed_while_it_is_converted(two: httpx.Client) -> None:
    put_tiny(two, "followed-behind-two", seed=3, ready=False)
    events = read(two, "/v1/models/followed-behind-two/versions/1/events")
    assert events[-1]["data"]["state"] == "ready"
    stored = two.get("/v1/models/followed-behind-two/versions/1/checkpoints/train").content
    assert stored == tiny.checkpoint(3)


def test_clients_that_leave_give_up_their_places(fronted: RunningServer, two: httpx.Client) -> None:
    """Seen by the batcher: what they sent is not computed."""
    before = _departed(two)
    body = tiny.npy(tiny.rows(250))
    url = "/v1/models/tiny/predict?form=train"
    head = raw.head("POST", url, content_type=tiny.NPY, content_length=str(len(body)))
    two.post(url, content=body, headers={"Content-Type": tiny.NPY})  # loads the training form
    assert _departed(two) == before, "not while they are there"
    deadline = time.monotonic() + 60
    for patience in itertools.cycle((0.08, 0.04, 0.02, 0.01)):  # s; nobody knows what fits here
        if _departed(two) > before:
            break
        assert time.monotonic() < deadline, "nobody was seen to leave"
        with ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(raw.connected(fronted.url)).sendall(head + body)
            time.sleep(patience)
    # Some may have been read after their clients left, and are yet to be found out.
    answer = lambda: two.post(url, content=body, headers={"Content-Type": tiny.NPY})  # noqa: E731
    eventually(lambda: answer().status_code == 200, "their places are free again")


def test_one_application_counts_the_requests_of_all(fronted: RunningServer) -> None:
    def counted() -> float:
        text = httpx.get(f"{fronted.url}/metrics").text
        (line,) = (
            line
            for line in text.splitlines()
            if line.startswith("foldserve_http_requests_total{") and '"/health/live"' in line
        )
        return float(line.rsplit(" ", 1)[1])

    httpx.get(f"{fronted.url}/health/live")
    before = counted()
    for _ in range(12):  # every one over a connection of its own
        httpx.get(f"{fronted.url}/health/live")
    assert counted() == before + 12


def test_nothing_accepted_is_lost_when_the_service_ends(tmp_path: Path) -> None:
    with running(tmp_path / "data", TWO) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert small.upload(client, "net", 1, wait=True).status_code == 201
        load = Load(server.url)
        eventually(lambda: load.answered >= 24, "load")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        load.join()
        assert server.process.wait(30) == 0
        assert time.monotonic() - begun < 30
        assert load.lost == []


def test_a_system_that_cannot_share_memory_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("service.api.server.configure", lambda settings: None)
    monkeypatch.setattr(sys, "platform", "darwin")
    settings = Settings(port=0, data_dir=tmp_path / "data", http_processes=2)
    assert run(settings) == 2
    assert "FOLDSERVE_HTTP_PROCESSES" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def _compared(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in _ITS_OWN}


def _departed(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    counts = [line for line in lines if 'outcome="departed"' in line and line[0] != "#"]
    return sum(float(line.rsplit(" ", 1)[1]) for line in counts)
