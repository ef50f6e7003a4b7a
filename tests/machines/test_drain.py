"""SIGTERM under load: whoever was accepted is answered, streams end, and the exit is 0."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx

from tests.api import tiny
from tests.machines import small
from tests.running import running

CLIENTS = 8


def test_nothing_accepted_is_lost_when_the_service_ends(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert small.upload(http, "net", 1, wait=True).status_code == 201
        answered, lost = [0], list[str]()
        stream_began, stream_ended = threading.Event(), threading.Event()

        def load() -> None:
            """Requests over a kept connection until the service says that it closes."""
            with httpx.Client(base_url=server.url, timeout=30) as http:
                while True:
                    try:
                        response = small.predict(http, "net")
                    except httpx.ConnectError:
                        return  # never accepted
                    except httpx.TransportError as error:
                        lost.append(repr(error))
                        return
                    if response.status_code != 200:
                        lost.append(response.text)
                    answered[0] += 1
                    if response.headers.get("connection") == "close":
                        return

        def follow() -> None:
            """The events of a version that waits, as long as they come."""
            with httpx.stream(
                "GET", f"{server.url}/v1/models/slow/versions/4/events", timeout=60
            ) as stream:
                for _ in stream.iter_bytes():
                    stream_began.set()
            stream_ended.set()

        with httpx.Client(base_url=server.url, timeout=60) as http:
            for _ in range(4):  # each takes a second or more to convert
                response = http.post(
                    "/v1/models/slow/versions",
                    files={"checkpoint": ("tiny.pth", tiny.checkpoint())},
                    data={"config": json.dumps(tiny.CONFIG)},
                )
                assert response.status_code == 202
        threads = [threading.Thread(target=load) for _ in range(CLIENTS)]
        threads.append(threading.Thread(target=follow))
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while answered[0] < 4 * CLIENTS or not stream_began.is_set():
            assert time.monotonic() < deadline, "the load never began"
            time.sleep(0.01)
        begun = time.monotonic()
        assert server.stop() == 0
        seconds = time.monotonic() - begun
        for thread in threads:
            thread.join(30)
        print(f"answered {answered[0]}, lost {len(lost)}, exit after {seconds:.1f} s")
        assert lost == []
        assert stream_ended.is_set()
        assert seconds < 30
    with running(tmp_path / "data") as server, httpx.Client(base_url=server.url) as http:
        left = http.get("/v1/models/slow").json()["versions"]
        assert all(version["error"] is None for version in left)
        assert {version["state"] for version in left} <= {"queued", "converting", "ready"}
