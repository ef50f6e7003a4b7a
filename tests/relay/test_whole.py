"""Requests that are here as a whole, over a link whose two ends are called directly."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from service.relay import memory, wire
from service.relay.back import Back
from service.relay.front import Aborted, Answer, Front
from tests.relay.test_back import SCOPE, Transport, frame

BODY = bytearray(b"\0body" * 100)
MADE = (207, b"a: b\r\n", b"made")


class End:
    """A transport that hands what is written to the other end, at the loop's next turn."""

    def __init__(self, to: wire.Link) -> None:
        self._to = to
        self.kinds: list[int] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        if len(data) >= wire._HEAD.size and wire._HEAD.unpack_from(data)[0] < 20:
            self.kinds.append(wire._HEAD.unpack_from(data)[0])
        asyncio.get_running_loop().call_soon(self._to.data_received, data)


class Asked:
    """A whole request, and what is done about it."""

    def __init__(self, known: Any, body: bytearray, work: Callable[[Asked], Awaitable[Any]]):
        self.known, self.body, self._work = known, body, work
        self.left = asyncio.Event()

    async def answer(self) -> Any:
        return await self._work(self)

    def leave(self) -> None:
        self.left.set()


class Answers:
    """Knows every path but one, and does with requests what the test says."""

    def __init__(self, work: Callable[[Asked], Awaitable[Any]]) -> None:
        self._work = work
        self.asked: list[Asked] = []

    def know(self, scope: dict[str, Any]) -> Any:
        return None if scope["path"] == "/other" else scope["path"]

    def whole(self, known: Any, body: bytearray) -> Asked:
        self.asked.append(Asked(known, body, self._work))
        return self.asked[-1]


class Linked:
    """A front and a back."""

    def __init__(self, answers: Answers | None, app: Any = None) -> None:
        descriptor = memory.create(1 << 16)
        self.tasks: set[asyncio.Task[None]] = set()
        self.front = Front(memory.writable(descriptor), lambda: None, lambda: None)
        self.back = Back(
            app, memory.readable(descriptor), self.tasks, lambda: None, lambda: None, answers
        )
        os.close(descriptor)
        self.sent, self.answered = End(self.back), End(self.front)
        self.front.connection_made(self.sent)  # type: ignore[arg-type]
        self.back.connection_made(self.answered)  # type: ignore[arg-type]


def ran(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await test

    asyncio.run(limited())


async def made(_: Asked) -> Any:
    return MADE


async def for_ever(asked: Asked) -> Any:
    await asked.left.wait()
    return None


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application of messages, which answers in three."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"path", b"x")]})
    await send({"type": "http.response.body", "body": message["body"], "more_body": True})
    await send({"type": "http.response.body", "body": scope["path"].encode()})


async def _streamed(stream: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)

    await stream(send)
    return messages


def test_a_whole_request_takes_one_frame_each_way() -> None:
    async def run() -> None:
        answers = Answers(made)
        linked = Linked(answers)
        head = linked.front.introduce(SCOPE)
        found = await asyncio.gather(*(linked.front.ask(head, BODY) for _ in range(3)))
        assert found == [Answer(*MADE)] * 3
        assert [(asked.known, asked.body) for asked in answers.asked] == 3 * [(SCOPE["path"], BODY)]
        assert linked.sent.kinds == [wire.HEAD, wire.WHOLE], "three in one write"
        assert linked.answered.kinds == [wire.ANSWER]
        assert not linked.tasks

    ran(run())


@pytest.mark.parametrize("answers", [None, Answers(made)])
def test_what_nobody_answers_as_a_whole_comes_in_messages(answers: Answers | None) -> None:
    async def run() -> None:
        linked = Linked(answers, echo)
        stream = await linked.front.ask(linked.front.introduce(SCOPE | {"path": "/other"}), BODY)
        assert not isinstance(stream, Answer)
        start, *bodies = await _streamed(stream)
        assert (start["status"], start["headers"]) == (200, [(b"path", b"x")])
        assert b"".join(body["body"] for body in bodies) == BODY + b"/other"
        assert not linked.front._open
        assert not linked.back._open

    ran(run())


def test_an_answer_that_is_not_whole_is_sent_on() -> None:
    async def late(asked: Asked) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 201, "headers": []})
            await send({"type": "http.response.body", "body": bytes(asked.body)})

        return app

    async def run() -> None:
        linked = Linked(Answers(late))
        stream: Any = await linked.front.ask(linked.front.introduce(SCOPE), BODY)
        start, body = await _streamed(stream)
        assert (start["status"], body["body"]) == (201, BODY)

    ran(run())


@pytest.mark.parametrize("pause", [0, 0.01])
def test_who_leaves_is_told_of(pause: float) -> None:
    """Also before the request has left: it goes first, and then that its client went."""

    async def run() -> None:
        answers = Answers(for_ever)
        linked = Linked(answers)
        asking = asyncio.ensure_future(linked.front.ask(linked.front.introduce(SCOPE), BODY))
        await asyncio.sleep(pause)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.01)
        if pause:
            assert answers.asked[0].left.is_set()
        assert not linked.tasks
        assert not linked.front._asked
        assert not linked.back._whole

    ran(run())


class Endless:
    """An application whose answer ends when its client is gone."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone.set()


def test_who_leaves_as_an_answer_begins_ends_it() -> None:
    async def run() -> None:
        endless = Endless()
        linked = Linked(None, endless)
        asking = asyncio.ensure_future(linked.front.ask(linked.front.introduce(SCOPE), BODY))
        while not linked.front._open:
            await asyncio.sleep(0)
        asking.cancel()  # the answer is there, and nobody has looked at it
        with pytest.raises(asyncio.CancelledError):
            await asking
        await endless.gone.wait()
        assert not linked.front._open

    ran(run())


def test_a_front_that_is_gone_takes_its_requests_along() -> None:
    async def run() -> None:
        answers = Answers(for_ever)
        linked = Linked(answers)
        asking = asyncio.ensure_future(linked.front.ask(linked.front.introduce(SCOPE), BODY))
        await asyncio.sleep(0.01)
        linked.back.connection_lost(None)
        await asyncio.sleep(0.01)
        assert answers.asked[0].left.is_set()
        assert not linked.tasks
        asking.cancel()

    ran(run())


def test_an_application_that_fails_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(_: Asked) -> Any:
        raise ZeroDivisionError("unexpected")

    async def run() -> None:
        linked = Linked(Answers(fails))
        with pytest.raises(Aborted):
            await linked.front.ask(linked.front.introduce(SCOPE), BODY)

    with caplog.at_level(logging.ERROR):
        ran(run())
    assert "ZeroDivisionError" in caplog.text


def test_what_is_cancelled_at_the_end_of_a_drain_is_told_of() -> None:
    async def run() -> None:
        linked = Linked(Answers(for_ever))
        asking = asyncio.ensure_future(linked.front.ask(linked.front.introduce(SCOPE), BODY))
        await asyncio.sleep(0.01)
        for task in linked.tasks:
            task.cancel()
        with pytest.raises(Aborted):
            await asking

    ran(run())


def test_an_application_may_ask_for_the_body_that_is_there() -> None:
    """As it does of a client that expects to be told."""

    async def run() -> None:
        linked = Linked(None, echo)
        scope = SCOPE | {"headers": [(b"expect", b"anything")]}
        stream: Any = await linked.front.ask(linked.front.introduce(scope), BODY)
        assert (await _streamed(stream))[0]["status"] == 200

    ran(run())


@pytest.mark.parametrize(
    "wrong",
    [
        frame(wire.WHOLE, 1, wire.COUNT.pack(7)),  # no such head
        frame(wire.WHOLE, 1, b"short"),
        frame(wire.FORGET, 7),
        frame(wire.HEAD, 7, b"[]"),
    ],
)
def test_a_front_that_talks_nonsense_is_cut_off(wrong: bytes) -> None:
    async def run() -> None:
        linked = Linked(Answers(made))
        head = frame(wire.HEAD, 5, wire.pack_scope(SCOPE))
        linked.back.data_received(head + frame(wire.WHOLE, 1, wire.COUNT.pack(5)))
        linked.back.data_received(frame(wire.FORGET, 5))
        await asyncio.sleep(0.01)
        with pytest.raises(Exception, match=r".") as raised:
            linked.back.data_received(wrong)
        assert not isinstance(raised.value, AssertionError)

    ran(run())


def test_no_front_takes_whole_requests() -> None:
    async def run() -> None:
        linked = Linked(None)
        with pytest.raises(ValueError, match="whole request"):
            linked.front.data_received(frame(wire.WHOLE, 1, wire.COUNT.pack(1)))

    ran(run())


def test_frames_arrive_in_the_order_in_which_they_were_written() -> None:
    async def run() -> None:
        link, transport = wire.Link(), Transport()
        link.connection_made(transport)  # type: ignore[arg-type]
        frames = [(wire.WHOLE, 1, b"a"), (wire.GONE, 1, b""), (wire.WHOLE, 2, b"b")]
        for kind, number, payload in frames:
            (link.write if kind == wire.GONE else link.write_soon)(kind, number, payload)
        await asyncio.sleep(0.01)
        assert transport.written == b"".join(frame(*each) for each in frames)

    ran(run())
