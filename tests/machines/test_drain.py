"""SIGTERM under load: whoever was accepted is answered, streams end, and the exit is 0."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from pathlib import Path

import httpx

from tests.api import tiny
from tests.machines import small
from tests.running import STOP_SECONDS, RunningServer, eventually, running

CLIENTS = 8
UPLOADS = 4


class Load:
    """Clients that ask over kept connections until the service says that it closes them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answered = 0
        self.lost: list[str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _ask(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while True:
                try:
                    response = small.predict(client, "net")
                except httpx.ConnectError:
                    return  # never accepted
                except httpx.TransportError as error:
                    self.lost.append(repr(error))
                    return
                if response.status_code != 200:
                    self.lost.append(response.text)
                self.answered += 1
                if response.headers.get("connection") == "close":
                    return


class Stream:
    """Somebody who follows a version that waits, as long as events come."""

    def __init__(self, url: str) -> None:
        self.began, self.ended = threading.Event(), threading.Event()
        self._url = url
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60)

    def _follow(self) -> None:
        with httpx.stream("GET", self._url, timeout=60) as stream:
            for _ in stream.iter_bytes():
                self.began.set()
        self.ended.set()


class HalfSent:
    """An upload whose second half is sent when the test says so."""

    def __init__(self, server: RunningServer) -> None:
        self._body = small.bundle(2)
        url = httpx.URL(server.url)
        self._connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
        self._connection.request("GET", "/health/live")
        before = self._connection.getresponse()
        before.read()
        assert before.getheader("connection") != "close", "nothing ends yet"
        self._connection.putrequest("POST", "/v1/models/late/versions")
        self._connection.putheader("Content-Type", "application/octet-stream")
        self._connection.putheader("Content-Length", str(len(self._body)))
        self._connection.endheaders(self._body[: len(self._body) // 2])

    def finish(self) -> http.client.HTTPResponse:
        self._connection.send(self._body[len(self._body) // 2 :])
        response = self._connection.getresponse()
        response.read()
        self._connection.close()
        return response


def test_nothing_accepted_is_lost_when_the_service_ends(tmp_path: Path) -> None:
    # The end of a whole process is what is measured, not that of a fork.
    with running(tmp_path / "data", fresh=True) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert small.upload(client, "net", 1, wait=True).status_code == 201
            for _ in range(UPLOADS):  # each takes a second or more to convert
                response = client.post(
                    "/v1/models/slow/versions",
                    files={"checkpoint": ("tiny.pth", tiny.checkpoint())},
                    data={"config": json.dumps(tiny.CONFIG)},
                )
                assert response.status_code == 202
        half_sent = HalfSent(server)
        load = Load(server.url)
        stream = Stream(f"{server.url}/v1/models/slow/versions/{UPLOADS}/events")
        eventually(lambda: load.answered >= 4 * CLIENTS and stream.began.is_set(), "load")
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: _is_closed(server.url), "nobody listens any more")
        late = half_sent.finish()
        assert server.process.wait(STOP_SECONDS) == 0
        seconds = time.monotonic() - begun
        load.join()
        stream.join()
        print(f"answered {load.answered}, lost {len(load.lost)}, exit after {seconds:.1f} s")
        assert load.lost == []
        assert (late.status, late.getheader("connection")) == (202, "close")
        assert stream.ended.is_set()
        assert seconds < 30
    with running(tmp_path / "data") as server, httpx.Client(base_url=server.url) as client:
        (accepted,) = client.get("/v1/models/late").json()["versions"]
        left = [accepted, *client.get("/v1/models/slow").json()["versions"]]
        assert [version["error"] for version in left] == [None] * (UPLOADS + 1)
        assert {version["state"] for version in left} <= {"queued", "converting", "ready"}


def _is_closed(url: str) -> bool:
    """Whether nobody listens there any more."""
    address = httpx.URL(url)
    try:
        socket.create_connection((address.host, address.port or 0), timeout=5).close()
    except OSError:
        return True
    return False
