"""Whoever repeats a head gets what the parser would have made of it, and the parser rests."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api import exchange, repetition
from service.api.complete import Complete
from service.api.guard import Guard
from service.api.layers import Application
from service.api.ratelimit import RateLimit
from service.api.repetition import Before, Repetition
from service.errors import Unauthorized
from service.settings import Settings
from service.store import Scope as KeyScope
from tests.api import test_complete
from tests.api.test_complete import Listener, Slow, post, run

BODIES = [b"abc", b"xyz", b"\r\n\r", b"GET"]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the parser was given."""
    seen: list[bytes] = []
    original = HttpToolsProtocol.data_received

    def data_received(self: HttpToolsProtocol, data: bytes) -> None:
        seen.append(data)
        original(self, data)

    monkeypatch.setattr(HttpToolsProtocol, "data_received", data_received)
    return seen


def sums(answers: Sequence[tuple[int, dict[str, str], bytes]]) -> list[int]:
    assert {status for status, _, _ in answers} == {200}
    return [json.loads(body)["sum"] for _, _, body in answers]


async def in_turn(
    listener: Listener, requests: Sequence[Sequence[bytes]]
) -> list[tuple[int, dict[str, str], bytes]]:
    """The answers on one connection to requests in pieces, each sent when the one before is."""
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    try:
        answers = []
        for pieces in requests:
            for number, piece in enumerate(pieces):
                if number:
                    await asyncio.sleep(0.005)
                writer.write(piece)
            answers.append(await test_complete._answer(reader))
        return answers
    finally:
        writer.close()


@pytest.mark.parametrize("whole", [True, False])
def test_the_parser_sees_a_head_once(tmp_path: Path, parsed: list[bytes], whole: bool) -> None:
    requests = [post("plain", body) for body in BODIES]
    pieces = [[each] if whole else _head_and_body(each) for each in requests]

    async def scenario(listener: Listener) -> None:
        assert sums(await in_turn(listener, pieces)) == [sum(body) for body in BODIES]

    run(tmp_path, scenario)
    assert b"".join(parsed) == requests[0]


@pytest.mark.parametrize(
    "next_",
    [
        post("plain", b"abcd"),
        post("plain", b"abc", "A: b\r\n"),
        post("other", b"abc"),
        post("plain", b"abc").replace(b"Host", b"host"),
    ],
)
def test_another_head_is_parsed(tmp_path: Path, parsed: list[bytes], next_: bytes) -> None:
    async def scenario(listener: Listener) -> None:
        answers = await in_turn(listener, [[post("plain")], [next_], [next_], [post("plain")]])
        assert {status for status, _, _ in answers} == {200}

    run(tmp_path, scenario)
    assert b"".join(parsed) == post("plain") + next_ + post("plain"), "the last one is remembered"


def test_a_body_that_does_not_come_is_waited_for_as_ever(
    tmp_path: Path, parsed: list[bytes]
) -> None:
    head, body = _head_and_body(post("plain"))

    async def scenario(listener: Listener) -> None:
        answers = await listener.ask(post("plain"), head, body, answers=2, pause=0.1)
        assert [json.loads(body)["complete"] for _, _, body in answers] == [True, False]

    run(tmp_path, scenario)
    assert b"".join(parsed) == 2 * post("plain")


def test_who_is_let_in_is_asked_every_time(tmp_path: Path, parsed: list[bytes]) -> None:
    """The head is the same, and the key has been revoked, or the bucket is empty."""

    class Keys:
        revoked = False

        def identify(self, presented: str) -> Any:
            if self.revoked:
                raise Unauthorized("revoked")
            return type("Key", (), {"id": presented, "scopes": frozenset({KeyScope.WRITE})})

    def statuses(guard: dict[str, Any], each: Any = None) -> list[int]:
        found = []

        async def scenario(listener: Listener) -> None:
            async with asyncio.timeout(10):
                reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
                for number in range(4):
                    if each is not None:
                        each(number)
                    writer.write(post("plain", extra="X-API-Key: k\r\n"))
                    found.append((await test_complete._answer(reader))[0])
                writer.close()

        listener = Listener(tmp_path)
        listener.app = _guarded(listener, **guard)
        asyncio.run(listener.run(scenario))
        return found

    keys, strict = Keys(), Settings(host="0.0.0.0", data_dir=tmp_path)
    assert statuses({"settings": strict, "keyring": keys}) == [200] * 4
    revoke = lambda number: setattr(keys, "revoked", number >= 2)  # noqa: E731
    assert statuses({"settings": strict, "keyring": keys}, revoke) == [200, 200, 401, 401]
    keys.revoked = False
    known = len(parsed)
    limited = {"settings": strict, "keyring": keys, "rate": RateLimit(0.01, 3)}
    assert statuses(limited) == [200, 200, 200, 429]
    assert len(parsed) == known + 1, "its head was known"


def test_a_head_that_was_refused_is_refused_again(tmp_path: Path) -> None:
    strange = post("plain").replace(b"Host: x", b"Host: elsewhere.example")

    async def scenario(listener: Listener) -> None:
        answers = await in_turn(listener, [[strange]] * 3)
        assert [status for status, _, _ in answers] == [421] * 3

    run(tmp_path, scenario)


def test_who_leaves_gives_up_a_place_held_by_a_repeated_head(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        for pieces in ([post("slow")], _head_and_body(post("slow"))):

            async def at_once() -> None:
                return None

            listener.app.state.slow = at_once
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(post("slow"))
            await test_complete._answer(reader)
            slow = listener.app.state.slow = Slow()
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.005)
            await asyncio.wait_for(slow.began.wait(), 5)
            writer.close()
            await asyncio.wait_for(slow.ended.wait(), 5)

    run(tmp_path, scenario)


def test_a_repeated_head_waits_its_turn(tmp_path: Path) -> None:
    """It comes while the request before it is under way."""

    async def scenario(listener: Listener) -> None:
        slow = listener.app.state.slow = Slow(0.2)
        plain, first = post("plain"), post("slow")
        await in_turn(listener, [[first]])
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(first)
        await test_complete._answer(reader)
        for pieces in ([first, first], [first, *_head_and_body(first)], [first, plain]):
            slow.most = 0
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(0.02)
            answers = [await test_complete._answer(reader) for _ in range(2)]
            assert sums(answers) == [sum(b"abc")] * 2
            assert slow.most == 1, "one after the other"
        writer.close()

    run(tmp_path, scenario)


def test_a_body_that_reads_like_a_repeated_request_is_a_body(tmp_path: Path) -> None:
    """Its own request has been refused before it is here: nothing else is under way."""
    inner = post("plain", b"xyz")
    size = test_complete.LIMIT + 1
    head = post("plain", b"").replace(b": 0", b": %d" % size)
    rest = bytes(size - len(inner))

    async def scenario(listener: Listener) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        statuses = []
        for piece in (post("plain"), head):
            writer.write(piece)
            statuses.append((await test_complete._answer(reader))[0])
        for piece in (inner, rest):
            writer.write(piece)
            await asyncio.sleep(0.05)
        writer.write(post("plain", b"abcd"))
        status, _, body = await test_complete._answer(reader)
        writer.close()
        assert [*statuses, status] == [200, 413, 200]
        assert json.loads(body)["sum"] == sum(b"abcd"), "and not the inner one's"

    run(tmp_path, scenario)


def test_empty_lines_between_repeated_requests_do_not_add_up(tmp_path: Path) -> None:
    async def scenario(listener: Listener) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        for _ in range(200):
            writer.write(post("plain"))
            assert (await test_complete._answer(reader))[0] == 200
            writer.write(b"\r\n" * 20)
            await asyncio.sleep(0.001)
        writer.close()

    run(tmp_path, scenario, max_head_bytes=1024)


@pytest.mark.parametrize("name", ["plain", "bad", "broken", "slow"])
def test_a_connection_that_is_gone_leaves_nothing(tmp_path: Path, name: str) -> None:
    """Neither itself nor a head that it remembered waits for the garbage collector."""

    async def scenario(listener: Listener) -> None:
        async def at_once() -> None:
            return None

        listener.app.state.slow = at_once
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        for _ in range(3):
            writer.write(post(name))
            await test_complete._answer(reader)
        if name == "slow":  # and now its client leaves
            slow = listener.app.state.slow = Slow()
            writer.write(post(name))
            await asyncio.wait_for(slow.began.wait(), 5)
        (connection,) = listener.state.connections
        gone = [weakref.ref(connection), weakref.ref(connection._before.head)]
        del connection
        writer.close()
        await asyncio.sleep(0.05)
        assert [ref() for ref in gone] == [None, None]

    gc.collect()
    gc.disable()
    try:
        run(tmp_path, scenario)
    finally:
        gc.enable()


def test_a_kept_head_is_counted_from_when_it_came(tmp_path: Path) -> None:
    """Its request's time, too, if the body is not all there at once."""
    head, body = _head_and_body(post("plain", b"abcd"))

    async def scenario(listener: Listener) -> None:
        await in_turn(listener, [[post("plain", b"abcd")], [head, body[:2], body[2:]]])

    counted = run(tmp_path, scenario).metrics.render().decode().splitlines()
    (line,) = (each for each in counted if each.startswith("foldserve_http_request_seconds_sum"))
    assert float(line.split()[-1]) >= 0.0095, "two pauses of 5 ms"


@pytest.mark.parametrize(
    ("data", "body", "remembered"),
    [
        (post("plain", b"abc"), b"abc", True),
        (post("plain", b""), b"", True),
        (post("plain", b"\r\n\r\n"), b"\r\n\r\n", True),
        (b"\r\n\r\n" + post("plain", b"abc"), b"abc", False),
        (post("plain", b"abc") + b"\r\n", b"abc", False),
        (post("plain", b"abc").replace(b": 3", b": 03"), b"abc", False),
        (post("plain", b"abc", "A: " + "b" * 5000 + "\r\n"), b"abc", False),
        (post("plain", b"abc", "Transfer-Encoding: chunked\r\n"), b"abc", False),
    ],
)
def test_what_is_remembered(data: bytes, body: bytes, remembered: bool) -> None:
    head = data.partition(b"\r\n\r\n")[0] if not data.startswith(b"\r\n") else data[4:]
    lines = [line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line]
    raw = [(name.lower(), value) for name, value in lines]
    request = Complete({"type": "http", "headers": raw}, _none, bytearray(body))
    before = Before.of(data, request)
    assert (before is not None) is remembered
    if before is not None:
        other = bytes(len(body))
        assert before.body_of(data[: len(data) - len(body)] + other) == other
        assert before.body_of(data + b"x") is None
        assert before.body_of(b"X" + data[1:]) is None


# ---- the same as without -----------------------------------------------------------------

CHUNKED = b"POST /v1/plain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
BLOCKS = [
    post("plain", b"abc"),
    post("plain", b"xyz"),
    post("plain", b"\r\n\r"),
    post("plain", post("plain", b"abc")),
    post("plain", b""),
    post("streamed", b"abc"),
    post("bad", b"abc"),
    post("plain", bytes(70_000)),
    CHUNKED + b"3\r\nabc\r\n0\r\n\r\n",
    b"GET /v1/plain HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n",
    b"\r\n\r\n",
    post("plain", b"abc", "Connection: close\r\n"),
    post("plain", b"abc", "Connection: keep-alive\r\n").replace(b"1.1", b"1.0"),
    post("plain", b"abc", "Expect: 100-continue\r\n"),
    post("plain", b"abc", "Upgrade: h2c\r\nConnection: upgrade\r\n"),
    b"nonsense\r\n\r\n",
]


class Wire(asyncio.Transport):
    """Keeps what a connection writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written += b"" if self.closed else bytes(data)

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 5) if name in ("peername", "sockname") else default

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


async def told(listener: Listener, pieces: Sequence[bytes]) -> tuple[list[str], bool, int]:
    """What is written to a connection that gets these pieces, but for ids; how often a head was
    known."""
    listener.app.middleware_stack = listener.app.build_middleware_stack()
    config = test_complete.uvicorn_config(listener.app, listener.settings)
    config.load()
    protocol: Any = config.http_protocol_class
    connection = protocol(config=config, server_state=listener.state, app_state={})
    transport, known = Wire(), 0
    connection.connection_made(transport)
    for piece in pieces:
        before = connection.cycle
        connection._parsed = False
        if not transport.closed:
            connection.data_received(piece)
        known += connection.cycle is not before and not connection._parsed
        while listener.state.tasks and not connection._in_message:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.sleep(0.004)
    for task in list(listener.state.tasks):
        task.cancel()
    await asyncio.sleep(0)
    connection.connection_lost(None)
    text = re.sub(rb"x-request-id: [0-9a-f]{32}", b"", transport.written)
    return text.decode("latin-1").split("\r\n"), transport.closed, known


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is held for long, and a connection tells whether its parser was at work."""
    for module in (exchange, repetition):
        monkeypatch.setattr(module, "HOLD_SECONDS", 0.001)
    original = HttpToolsProtocol.data_received

    def data_received(self: Any, data: bytes) -> None:
        self._parsed = True
        original(self, data)

    monkeypatch.setattr(HttpToolsProtocol, "data_received", data_received)
    return


def test_every_stream_gets_the_answers_of_the_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurried: None
) -> None:
    """Random requests, cut at random places, with heads remembered and without."""
    seen = 0

    def compare(blocks: list[bytes], cuts: list[int]) -> None:
        nonlocal seen
        pieces = list(_cut(blocks, random.Random(str(cuts))))
        with_, closed, known = asyncio.run(told(Listener(tmp_path), pieces))
        with monkeypatch.context() as without:
            without.setattr(Repetition, "repeats", lambda self, data: False)
            parsed_, closed_too, never = asyncio.run(told(Listener(tmp_path), pieces))
        assert with_ == parsed_
        assert (closed, never) == (closed_too, 0)
        seen += known

    likely = st.one_of(st.sampled_from(BLOCKS[:2]), st.sampled_from(BLOCKS))
    strategy = given(st.lists(likely, min_size=2, max_size=6), st.lists(st.integers(0, 9)))
    settings(max_examples=150, deadline=None, database=None)(strategy(compare))()
    assert seen > 50, "heads were repeated"


def _cut(blocks: Sequence[bytes], chance: random.Random) -> Iterator[bytes]:
    """The stream in pieces: mostly request by request, some in two, some joined."""
    rest = b""
    for block in blocks:
        rest += block
        way = chance.random()
        if way < 0.15:
            continue  # together with the next
        if way < 0.4:
            at = (
                rest.find(b"\r\n\r\n") + 4 if chance.random() < 0.6 else chance.randrange(len(rest))
            )
            yield from filter(None, (rest[:at], rest[at:]))
        else:
            yield rest
        rest = b""
    if rest:
        yield rest


def _head_and_body(request: bytes) -> list[bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    return [head + b"\r\n\r\n", body]


def _guarded(listener: Listener, **guard: Any) -> Application:
    """The listener's application behind another guard."""
    app = Application()
    app.state.service = listener.app.state.service
    for layer, arguments, options in reversed(listener.app.user_middleware):
        options = guard if layer is Guard else options
        app.add_middleware(layer, *arguments, **options)
    return app


async def _none() -> Any:
    raise AssertionError("nothing is received")
