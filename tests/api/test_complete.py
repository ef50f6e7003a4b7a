"""Requests that come in one piece are answered as if they had come in several, only sooner.

A real listener with the service's own connections, layers and limits; the routes tell how their
request came. Everything else of an answer must be the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import socket
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import APIRouter
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from uvicorn.server import ServerState

from service.api import exchange
from service.api.bodies import chunks, whole
from service.api.complete import Complete
from service.api.direct import DirectDispatch, DirectRoute, direct
from service.api.front_process import uvicorn_config
from service.api.guard import Guard
from service.api.inference import unless_departed
from service.api.keyring import Keyring
from service.api.layers import Application
from service.api.metrics import Metrics
from service.api.middleware import AroundEveryRequest
from service.errors import BadInput
from service.settings import Settings
from tests.api import tiny
from tests.api.raw import answer, connected
from tests.running import RunningServer

LIMIT = 50_000
SECONDS = 10
router = APIRouter(route_class=DirectRoute)


async def serve(request: Request) -> Response:
    """What the test asks for by the name in its address."""
    name = request.path_params["name"]
    if name == "streamed":
        body = b"".join([chunk async for chunk in chunks(request, SECONDS)])
    else:
        body = bytes(await whole(request, LIMIT, SECONDS, "LIMIT"))
    if name == "bad":
        raise BadInput("no")
    if name == "broken":
        raise RuntimeError("unexpected")
    if name == "slow":
        await unless_departed(request, request.app.state.slow())
    if name == "long":
        return Response(bytes(200_000))
    told = {"complete": isinstance(request, Complete), "bytes": len(body), "sum": sum(body)}
    return Response(json.dumps(told), media_type="application/json", headers={"Name": name})


@router.post("/{name}")
@direct(serve)
async def documented(name: str) -> None:
    """Nothing."""


class Listener:
    """An application behind real connections, and what it was asked."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(data_dir=folder, **settings)
        self.metrics = Metrics()
        self.app = Application()
        self.app.state.service = SimpleNamespace(settings=self.settings, draining=False)
        self.app.add_middleware(DirectDispatch, routers=[("/v1", router)])
        self.app.add_middleware(Guard, settings=self.settings, keyring=Keyring(1))
        self.app.add_middleware(AroundEveryRequest, metrics=self.metrics, access_log=False)
        self.state = ServerState()
        self.port = 0

    async def run(self, scenario: Callable[[Listener], Awaitable[None]]) -> None:
        self.app.middleware_stack = self.app.build_middleware_stack()
        config = uvicorn_config(self.app, self.settings)
        config.load()
        state = self.state
        protocol: Any = config.http_protocol_class
        listening = await asyncio.get_running_loop().create_server(
            lambda: protocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        async with listening:
            self.port = listening.sockets[0].getsockname()[1]
            await scenario(self)
            for connection in list(state.connections):
                connection.transport.close()

    async def ask(
        self, *pieces: bytes, answers: int = 1, pause: float = 0.05
    ) -> list[tuple[int, dict[str, str], bytes]]:
        """The answers to what is sent on one connection, piece by piece."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for number, piece in enumerate(pieces):
                if number:
                    await asyncio.sleep(pause)
                writer.write(piece)
            return [await _answer(reader) for _ in range(answers)]
        finally:
            writer.close()


class Slow:
    """Work that takes longer than any client waits, and tells that it began and ended.

    `most` is how often it was under way at the same time.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self._seconds = seconds
        self._running = self.most = 0

    async def __call__(self) -> None:
        self._running += 1
        self.most = max(self.most, self._running)
        self.began.set()
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self._running -= 1
            self.ended.set()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(SECONDS):
        top = ["HTTP/1.1 100 Continue"]
        while top[0].endswith("100 Continue"):
            top = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in top[1:] if line)
        body = await reader.readexactly(int(fields["content-length"]))
    return int(top[0].split()[1]), fields, body


def post(name: str, body: bytes = b"abc", extra: str = "") -> bytes:
    head = f"POST /v1/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def apart(request: bytes) -> tuple[bytes, bytes]:
    """The request in two pieces, the second with its body or the last byte of it."""
    head, _, body = request.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + body[:-1], body[-1:]


def run(folder: Path, scenario: Callable[[Listener], Awaitable[None]], **settings: Any) -> Listener:
    listener = Listener(folder, **settings)
    asyncio.run(listener.run(scenario))
    return listener


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("plain"), 200),
        (post("plain", bytes(range(256)) * 100), 200),
        (post("streamed", b"x" * 1000), 200),
        (post("long"), 200),
        (post("bad"), 422),
        (post("broken"), 500),
        (post("plain", b"x" * (LIMIT + 1)), 413),
        (post("plain", extra="Connection: close\r\n"), 200),
        (post("plain", extra="Origin: https://elsewhere.example\r\n"), 403),
        (post("plain", extra="X-Request-ID: given-1\r\n"), 200),
        (post("plain").replace(b"Host: x", b"Host: elsewhere.example"), 421),
        (post("plain").replace(b"/v1/plain", b"/v1/pl%61in"), 200),
        (post("plain").replace(b"/v1/plain", b"/v1/plain?a=" + b"b" * 1500), 414),
    ],
)
def test_both_ways_give_the_same_answer(tmp_path: Path, request_: bytes, status: int) -> None:
    async def scenario(listener: Listener) -> None:
        ((*at_once, first),) = await listener.ask(request_)
        ((*later, second),) = await listener.ask(*apart(request_))
        assert at_once[0] == later[0] == status
        for fields in (at_once[1], later[1]):
            assert fields.pop("x-request-id") == "given-1" or b"given-1" not in request_
        if status == 200 and first[:1] == b"{":
            came, waited = json.loads(first), json.loads(second)
            assert came.pop("complete") is True
            assert waited.pop("complete") is False
            assert came == waited
            at_once[1].pop("content-length"), later[1].pop("content-length")  # true and false
        else:
            assert first == second
        assert at_once[1] == later[1]

    listener = run(tmp_path, scenario, max_url_bytes=1500)
    counted = listener.metrics.render().decode()
    route = "unmatched" if status in (403, 414, 421) else "/v1/{name}"
    line = f'foldserve_http_requests_total{{method="POST",route="{route}",status="{status}"}} 2.0'
    assert line in counted.splitlines()
    assert "foldserve_http_requests_running 0.0" in counted.splitlines()


@pytest.mark.parametrize(
    "extra",
    ["Expect: 100-continue\r\n", "X-Forwarded-For: 9.9.9.9\r\n", "x-forwarded-proto: https\r\n"],
)
def test_what_only_messages_can_serve_is_left_to_them(tmp_path: Path, extra: str) -> None:
    async def scenario(listener: Listener) -> None:
        ((status, _, body),) = await listener.ask(post("plain", extra=extra))
        assert (status, json.loads(body)["complete"]) == (200, False)

    run(tmp_path, scenario)


def test_a_layer_that_wants_messages_gets_them(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        ((_, _, body),) = await listener.ask(post("plain"))
        assert json.loads(body)["complete"] is False

    listener = Listener(tmp_path)
    listener.app.add_middleware(CORSMiddleware)
    asyncio.run(listener.run(scenario))
    assert listener.app.complete is None


def test_a_body_in_chunks_may_be_complete_too(tmp_path: Path) -> None:
    chunked = b"POST /v1/plain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def scenario(listener: Listener) -> None:
        ((_, _, body),) = await listener.ask(chunked + b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")
        assert json.loads(body) == {"complete": True, "bytes": 3, "sum": sum(b"abc")}
        ((_, _, body),) = await listener.ask(chunked + b"2\r\nab\r\n", b"0\r\n\r\n")
        assert json.loads(body) == {"complete": False, "bytes": 2, "sum": sum(b"ab")}

    run(tmp_path, scenario)


@pytest.mark.parametrize(("patience", "complete"), [(5.0, True), (0.0, False)])
def test_a_small_body_may_come_right_behind_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float, complete: bool
) -> None:
    monkeypatch.setattr(exchange, "HOLD_SECONDS", patience)

    async def scenario(listener: Listener) -> None:
        for size in (3, 40_000):
            request = post("plain", bytes(size))
            ((_, _, body),) = await listener.ask(*apart(request))
            assert json.loads(body) == {"complete": complete, "bytes": size, "sum": 0}
        big = post("streamed", bytes(70_000))  # nobody would read so much before it is asked for
        ((_, _, body),) = await listener.ask(*apart(big))
        assert json.loads(body) == {"complete": False, "bytes": 70_000, "sum": 0}

    run(tmp_path, scenario)


def test_who_leaves_with_the_body_unsent_is_forgotten(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        for _ in range(3):
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(apart(post("plain"))[0])
            await asyncio.sleep(0.005)
            writer.close()
        await asyncio.sleep(0.1)

    listener = run(tmp_path, scenario)
    assert "foldserve_http_requests_running 0.0" in listener.metrics.render().decode().splitlines()


def test_several_requests_in_one_piece_are_answered_in_their_order(tmp_path: Path) -> None:
    requests = [post("plain", bytes([n]) * (n + 1)) for n in range(5)]

    async def scenario(listener: Listener) -> None:
        answers = await listener.ask(b"".join(requests), answers=5)
        assert [json.loads(body)["bytes"] for _, _, body in answers] == [1, 2, 3, 4, 5]
        cut = len(requests[0]) + len(requests[1]) - 1
        answers = await listener.ask(b"".join(requests)[:cut], b"".join(requests)[cut:], answers=5)
        assert [json.loads(body)["sum"] for _, _, body in answers] == [0, 2, 6, 12, 20]

    run(tmp_path, scenario)


def test_who_leaves_with_another_request_behind_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(listener: Listener) -> None:
        slow = listener.app.state.slow = Slow()
        _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(post("slow") + post("plain"))
        await asyncio.wait_for(slow.began.wait(), SECONDS)
        (connection,) = listener.state.connections
        connection.transport.abort()  # nothing is read meanwhile: an end would not be noticed
        await asyncio.wait_for(slow.ended.wait(), 5)
        await asyncio.sleep(0.05)
        writer.close()

    run(tmp_path, scenario)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_a_client_that_leaves_gives_up_its_place(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        slow = listener.app.state.slow = Slow()
        for pieces in ([post("slow")], apart(post("slow"))):
            slow.began.clear(), slow.ended.clear()
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.05)
            await asyncio.wait_for(slow.began.wait(), SECONDS)
            writer.close()
            await asyncio.wait_for(slow.ended.wait(), 5)
        await asyncio.sleep(0.05)

    listener = run(tmp_path, scenario)
    line = 'foldserve_http_requests_total{method="POST",route="/v1/{name}",status="499"} 2.0'
    assert line in listener.metrics.render().decode().splitlines()


def test_what_is_cancelled_at_the_end_of_a_drain_gets_an_answer(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        slow = listener.app.state.slow = Slow()
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(post("slow"))
        await asyncio.wait_for(slow.began.wait(), SECONDS)
        for task in listener.state.tasks:
            task.cancel()
        assert (await _answer(reader))[0] == 500
        writer.close()

    run(tmp_path, scenario)


def _complete() -> Complete:
    async def receive() -> Any:
        await asyncio.sleep(SECONDS)

    return Complete({"type": "http", "headers": []}, receive, bytearray(b"[1]"))


def test_a_departure_is_told_from_any_other_cancelling() -> None:
    async def waiting(request: Complete) -> None:
        await unless_departed(request, asyncio.sleep(SECONDS))

    async def scenario() -> None:
        left, stopped = _complete(), _complete()
        tasks = [asyncio.create_task(waiting(request)) for request in (left, stopped)]
        await asyncio.sleep(0)
        left.departure.tell()
        tasks[1].cancel()
        with pytest.raises(ClientDisconnect):
            await tasks[0]
        assert not tasks[0].cancelling()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        with pytest.raises(ClientDisconnect):  # who has left already need not wait at all
            await waiting(left)

    asyncio.run(scenario())


def test_a_departure_ends_nothing_but_the_waiting() -> None:
    async def work(request: Complete) -> str:
        await unless_departed(request, asyncio.sleep(0))
        request.departure.tell()
        await asyncio.sleep(0)  # such as an upload that is being committed
        return "done"

    assert asyncio.run(work(_complete())) == "done"


def test_starlettes_own_ways_to_the_body_find_it() -> None:
    async def scenario() -> None:
        assert await _complete().json() == [1]
        assert await _complete().body() == b"[1]"
        assert b"".join([piece async for piece in _complete().stream()]) == b"[1]"

    asyncio.run(asyncio.wait_for(scenario(), SECONDS))


def _holds(thing: object, size: int) -> bool:
    return type(thing) is Complete and len(thing.content) == size


def test_nothing_of_an_answered_request_is_kept(tmp_path: Path) -> None:
    kept: list[weakref.ref[Any]] = []

    async def scenario(listener: Listener) -> None:
        async def slow() -> None:
            kept.extend(weakref.ref(each) for each in gc.get_objects() if _holds(each, 40_000))

        listener.app.state.slow = slow
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(post("slow", bytes(40_000)))
        assert (await _answer(reader))[0] == 200
        await asyncio.sleep(0)
        gc.collect()
        assert [each() for each in kept] == [None]  # with its connection still open
        writer.close()

    run(tmp_path, scenario)


def test_the_time_of_a_request_begins_with_its_head(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        await listener.ask(*apart(post("plain")), pause=0.3)

    text = run(tmp_path, scenario).metrics.render().decode()
    (total,) = re.findall(r"^foldserve_http_request_seconds_sum\{.*\} (.*)$", text, re.MULTILINE)
    assert 0.3 <= float(total) < SECONDS
    assert 'foldserve_http_request_seconds_bucket{le="1.0",route="/v1/{name}"} 1.0' in text


def test_layers_that_are_put_together_anew_are_looked_at_anew(tmp_path: Path) -> None:
    app = Listener(tmp_path).app
    app.build_middleware_stack()
    assert app.complete is not None
    app.add_middleware(CORSMiddleware)
    app.build_middleware_stack()
    assert app.complete is None


def test_a_service_that_drains_says_so_both_ways(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        listener.app.state.service.draining = True
        for pieces in ([post("plain")], apart(post("plain"))):
            ((status, fields, body),) = await listener.ask(*pieces)
            assert (status, fields["connection"]) == (200, "close")
            assert json.loads(body)["complete"] is (len(pieces) == 1)

    run(tmp_path, scenario)


def _send(connection: socket.socket, pieces: Sequence[bytes]) -> None:
    for number, piece in enumerate(pieces):
        time.sleep(0.05 * number)
        connection.sendall(piece)


@pytest.mark.parametrize("key", ["", "reader", "predictor"])
def test_keys_are_asked_for_both_ways(
    guarded: tuple[RunningServer, dict[str, str]], key: str
) -> None:
    server, keys = guarded
    extra = f"Authorization: Bearer {keys[key]}\r\n" if key else ""
    request = post("models/missing/predict", extra=extra)
    wanted = {"": (401, "unauthorized"), "reader": (403, "forbidden")}
    for pieces in ([request], apart(request)):
        with connected(server.url) as connection:
            _send(connection, pieces)
            status, _, body = answer(connection)
            assert (status, body["code"]) == wanted.get(key, (404, "model_not_found"))


def test_predictions_are_the_same_both_ways(server: RunningServer, model: str) -> None:
    row = tiny.npy(tiny.rows(1)[0])
    asked = json.dumps(
        {
            "inputs": [
                {
                    "name": "input_0",
                    "datatype": "FP32",
                    "shape": [1, *tiny.rows(1)[0].shape],
                    "data": tiny.rows(1)[0].ravel().tolist(),
                }
            ]
        }
    ).encode()
    requests = [
        post(f"models/{model}/predict", row, "Content-Type: application/x-npy\r\n"),
        post(f"models/{model}/infer", asked).replace(b"/v1/", b"/v2/"),
    ]
    for request in requests:
        found = []
        for pieces in ([request], apart(request)):
            with connected(server.url) as connection:
                _send(connection, pieces)
                status, fields, body = answer(connection)
                assert status == 200, body
                assert not {"date", "x-request-id"} - fields.keys()
                found.append((fields.keys(), body))
        assert found[0] == found[1]


def test_a_connection_is_closed_once_its_last_pause_was_too_long(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        for pause in (0.0, 0.7, 0.7):  # longer than a second in all, and each shorter
            await asyncio.sleep(pause)
            writer.write(post("plain"))
            assert (await _answer(reader))[0] == 200
        rested = loop.time()
        assert await asyncio.wait_for(reader.read(), SECONDS) == b""
        assert 0.9 < loop.time() - rested < 3
        writer.close()

    run(tmp_path, scenario, keep_alive_seconds=1)


UPGRADE = "Connection: Upgrade\r\nUpgrade: {}\r\n"


@pytest.mark.parametrize("protocol", ["websocket", "h2c", "anything"])
def test_a_body_is_never_taken_for_a_request(tmp_path: Path, protocol: str) -> None:
    """The parser skips the body of a request that asks for another protocol."""
    inner = post("smuggled", b"inner")
    outer = post("plain", inner, UPGRADE.format(protocol))

    async def scenario(listener: Listener) -> None:
        for pieces in ([outer], apart(outer), (outer[: -len(inner)], inner)):
            ((status, fields, body),) = await listener.ask(*pieces)
            assert (status, fields["connection"]) == (400, "close")
            assert "no body" in json.loads(body)["detail"]
        # Without a body it is served, and nothing behind it.
        alone = post("plain", b"", UPGRADE.format(protocol))
        for pieces in ([alone + inner], (alone, inner)):
            ((status, fields, _),) = await listener.ask(*pieces)
            assert (status, fields["connection"]) == (200, "close")

    counted = run(tmp_path, scenario).metrics.render().decode()
    assert 'foldserve_http_requests_total{method="POST",route="/v1/{name}",status="200"} 2.0' in (
        counted
    )


CHUNKED = b"POST /v1/plain HTTP/1.1\r\nHost: %b\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"


def test_a_trailer_changes_nothing_of_the_head(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        for host, wanted in ((b"elsewhere.example", 421), (b"x", 200)):
            ((status, fields, _),) = await listener.ask(
                CHUNKED % host + b"0\r\nHost: x\r\nX-Request-ID: trailed\r\n\r\n"
            )
            assert status == wanted
            assert fields["x-request-id"] != "trailed"

    run(tmp_path, scenario)


@pytest.mark.parametrize("endless", [b"0\r\nX-T: ", b"1;"])
def test_a_trailer_or_an_extension_ends_somewhere(tmp_path: Path, endless: bytes) -> None:
    async def scenario(listener: Listener) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(CHUNKED % b"x" + endless)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10 * listener.settings.max_head_bytes:
                writer.write(bytes([97]) * 4096)
                await writer.drain()
                sent += 4096
                await asyncio.sleep(0.001)
            pytest.fail("it was read to no end")
        with contextlib.suppress(ConnectionError):
            assert b"431" in await reader.read(20)
        writer.close()

    run(tmp_path, scenario)


def test_a_long_body_in_many_chunks_is_no_endless_trailer(tmp_path: Path) -> None:
    chunks_ = b"".join(b"%x\r\n%b\r\n" % (size, bytes(size)) for size in (1, 700) * 60)

    async def scenario(listener: Listener) -> None:
        pieces = [CHUNKED % b"x", *(chunks_[at : at + 9000] for at in range(0, len(chunks_), 9000))]
        ((status, _, body),) = await listener.ask(*pieces, b"0\r\nX-T: a\r\n\r\n", pause=0.01)
        assert (status, json.loads(body)["bytes"]) == (200, 1 + 60 * 701)

    run(tmp_path, scenario)
