"""A device that nothing but another process can cure: the service becomes one, by itself."""

from __future__ import annotations

import http.client
import io
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from service import pack
from tests.machines import small
from tests.processes import descendants
from tests.running import RunningServer, eventually, running

AGAIN_SECONDS = 120
"""What a restart may take, on a machine that has other things to do too."""


class Watcher:
    """Asks for one path, over one connection after the other, and counts what comes."""

    def __init__(self, url: str, path: str) -> None:
        self.seen: list[tuple[int, str]] = []
        self._url, self._path = url, path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        eventually(lambda: bool(self.seen), "the first answer")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)

    @property
    def statuses(self) -> list[int]:
        return [status for status, _ in self.seen]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._stop.is_set():
                with suppress(httpx.TransportError):  # nobody listens for a while
                    answer = client.get(self._path)
                    self.seen.append((answer.status_code, answer.text))
                self._stop.wait(0.02)


class HalfAsked:
    """A prediction whose second half is sent when the test says so, so that it was accepted."""

    def __init__(self, url: str) -> None:
        body = io.BytesIO()
        np.save(body, np.ones((1, 1, small.SIDE, small.SIDE), np.float32))
        self._body = body.getvalue()
        where = httpx.URL(url)
        self._connection = http.client.HTTPConnection(where.host, where.port, timeout=60)
        self._connection.putrequest("POST", "/v1/models/net/predict")
        self._connection.putheader("Content-Type", "application/x-npy")
        self._connection.putheader("Content-Length", str(len(self._body)))
        self._connection.endheaders(self._body[:20])

    def finish(self) -> tuple[http.client.HTTPResponse, str]:
        self._connection.send(self._body[20:])
        answer = self._connection.getresponse()
        text = answer.read().decode()
        self._connection.close()
        return answer, text


def free_port() -> str:
    """A port of its own: with 0 the service that starts anew would take another one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@contextmanager
def sticky(folder: Path, **environment: str) -> Iterator[tuple[RunningServer, Path]]:
    """A service whose device is lost once the file beside it exists; it serves `net` already."""
    flag = folder / "sticky"
    own = {"FAULT": "sticky_device", "STICKY_ERROR": str(flag), "FOLDSERVE_MAX_BATCH": "1"}
    module = "tests.machines.broken"
    with running(
        folder / "data", own | environment, "--port", free_port(), fresh=True, module=module
    ) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert small.upload(client, "net", 3, wait=True).status_code == 201
            assert small.answer(client, "net") == 4.0
        yield server, flag


def events(server: RunningServer) -> Counter[str]:
    return Counter(line["event"] for line in server.log())


def lose(server: RunningServer) -> None:
    """Send the request that the device does not survive."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answer = small.predict(client, "net")
    assert (answer.status_code, answer.json()["code"]) == (500, "backend_failed")


def held(server: RunningServer) -> set[str]:
    """Its pipes, sockets and locks, by names that no others have."""
    folder = Path(f"/proc/{server.process.pid}/fd")
    found = set()
    for number in os.listdir(folder):
        with suppress(OSError):
            if int(number) > 2 and (name := os.readlink(folder / number)).endswith(("]", "/lock")):
                found.add(name)
    return found


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_lost_device_is_left_behind(tmp_path: Path, processes: str) -> None:
    with sticky(tmp_path, FOLDSERVE_HTTP_PROCESSES=processes) as (server, flag):
        pid, url = server.process.pid, server.url
        before, children, many = held(server), descendants(pid), server.descriptors()
        assert len(before) > 3, "the control: there is something to leave behind"
        watched = {name: Watcher(url, f"/health{name}") for name in ("", "/live", "/ready")}
        half = HalfAsked(url)
        flag.write_text("once")
        lose(server)
        eventually(lambda: 503 in watched["/ready"].statuses, "readiness is off", seconds=2)
        answer, text = half.finish()
        assert (answer.status, '"model_faulty"' in text) == (503, True), text
        assert int(answer.getheader("Retry-After") or 0) >= 1
        eventually(lambda: events(server)["ready"] == 2, "it starts anew", AGAIN_SECONDS)
        eventually(lambda: watched["/ready"].statuses[-1] == 200, "ready again", AGAIN_SECONDS)
        for watcher in watched.values():
            watcher.stop()

        changes = [status for status, _ in watched["/ready"].seen]
        first = changes.index(503)
        back = changes.index(200, first)
        assert set(changes[:first]) | set(changes[back:]) == {200}, "off once, and on once"
        assert set(watched["/live"].statuses) == {200}
        assert any("cpu: CUDA error: device-side assert" in text for _, text in watched[""].seen)

        assert server.process.poll() is None
        with httpx.Client(base_url=url, timeout=60) as client:
            assert small.answer(client, "net") == 4.0
            health = client.get("/health").json()
        assert (health["status"], health["lost_devices"]) == ("ok", [])
        said = events(server)
        assert (said["device_lost"], said["restarting"]) == (1, 1)
        assert said["model_recovered"] == said["reload_failed"] == 0, "nothing was tried in place"
        assert all(not Path(f"/proc/{child}").exists() for child in children)
        eventually(lambda: len(descendants(pid)) == len(children), "as many children as before")
        assert not {name for name in held(server) & before if not name.startswith("anon")}
        eventually(lambda: server.descriptors() <= many, f"as few descriptors as before: {many}")
        assert server.stop() == 0


def test_whoever_wants_the_end_meanwhile_gets_it(tmp_path: Path) -> None:
    with sticky(tmp_path) as (server, flag):
        half = HalfAsked(server.url)  # the drain waits for it
        flag.write_text("once")
        lose(server)
        eventually(lambda: events(server)["device_lost"] == 1, "it is seen")
        threading.Timer(1, half.finish).start()
        assert server.stop() == 0
        assert events(server)["restarting"] == 0


def test_a_fault_that_comes_back_ends_the_process(tmp_path: Path) -> None:
    """Once it is anew in vain, when its models are loaded; a second time it does not try."""
    with sticky(tmp_path, FOLDSERVE_RESTART_LIMIT="1") as (server, flag):
        flag.write_text("always")
        lose(server)
        assert server.process.wait(AGAIN_SECONDS) == 1
        said = events(server)
        assert (said["device_lost"], said["restarting"], said["ready"]) == (2, 1, 2)
        assert said["restarted too often"] == 1


class Table(nn.Module):
    """A network that an index out of range makes fail on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, indices: Tensor) -> Tensor:
        output: Tensor = self.linear(self.table(indices).mean(1))
        return output


def look_up(client: httpx.Client, index: int) -> httpx.Response:
    rows = {"name": "input_0", "datatype": "INT64", "shape": [1, 2], "data": [0, index]}
    return client.post("/v2/models/table/infer", json={"inputs": [rows]})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_device_that_is_really_lost(tmp_path: Path, processes: str) -> None:
    """By an index out of range, once; and a second time, when the service may not start anew."""
    own = {"FOLDSERVE_DEVICE": "cuda", "FOLDSERVE_HTTP_PROCESSES": processes}
    own |= {"FOLDSERVE_MAX_BATCH": "4", "FOLDSERVE_RESTART_LIMIT": "1"}
    torch.manual_seed(0)
    network, bundle = Table().eval(), tmp_path / "table.safetensors"
    pack(network, (torch.zeros(2, 2, dtype=torch.int64),), bundle)
    truth = network(torch.tensor([[0, 3]]))[0].tolist()
    with running(tmp_path / "data", own, "--port", free_port(), fresh=True) as server:

        def is_right(client: httpx.Client) -> bool:
            (output,) = look_up(client, 3).json()["outputs"]
            return bool(output["data"] == pytest.approx(truth, abs=1e-5))

        with httpx.Client(base_url=server.url, timeout=60) as client:
            sent = client.post(
                "/v1/models/table/versions",
                content=bundle.read_bytes(),
                headers={"Content-Type": "application/octet-stream", "Prefer": "wait=60"},
            )
            assert sent.status_code == 201, sent.text
            assert is_right(client)
            before, many = held(server), server.descriptors()
            assert look_up(client, 4).status_code == 500
        eventually(lambda: events(server)["ready"] == 2, "it starts anew", AGAIN_SECONDS)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            ready = "/health/ready"
            eventually(lambda: client.get(ready).status_code == 200, "ready", AGAIN_SECONDS)
            assert is_right(client)
            assert not {name for name in held(server) & before if not name.startswith("anon")}
            eventually(lambda: server.descriptors() <= many, f"no more descriptors than {many}")
            assert look_up(client, 4).status_code == 500
        assert server.process.wait(AGAIN_SECONDS) == 1
        assert events(server)["device_lost"] == 2
