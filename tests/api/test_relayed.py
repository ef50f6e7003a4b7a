"""What an HTTP process makes of whole requests; the rest is in `test_fronts` and `tests/relay`."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from service.api.complete import Complete, Head, InMessages
from service.api.known import MadeResponse
from service.api.relayed import Passing
from service.relay import wire
from service.relay.front import Answer
from tests.relay.test_back import SCOPE
from tests.relay.test_whole import BODY, MADE, Answers, Endless, Linked, echo, made, ran


def test_a_head_goes_over_once_and_is_forgotten_with_its_last_request() -> None:
    async def never() -> Any:
        raise AssertionError("nothing is received")

    async def run() -> None:
        linked = Linked(Answers(made), echo)
        passing = Passing(linked.front)
        answer = passing.complete.answer
        head = Head(SCOPE["headers"])  # type: ignore[arg-type]
        gc.disable()
        try:
            for _ in range(3):
                response = await answer(Complete(SCOPE, never, BODY, head))
                assert isinstance(response, MadeResponse)
                assert (response.status_code, bytes(response.body)) == (MADE[0], MADE[2])
                assert response.raw_headers == [(b"a", b"b")]
                assert len(linked.back._heads) == 1
            del head
            await asyncio.sleep(0.01)
            assert not linked.back._heads
        finally:
            gc.enable()
        assert linked.sent.kinds.count(wire.HEAD) == 1
        other = await answer(Complete(SCOPE | {"path": "/other"}, never, BODY))
        assert isinstance(other, InMessages)

    ran(run())


def test_a_client_that_leaves_a_stream_ends_it() -> None:
    async def nothing(_: Any) -> None:
        return None

    async def run() -> None:
        endless = Endless()
        linked = Linked(None, endless)
        request = Complete(SCOPE, nothing, BODY)  # type: ignore[arg-type]
        response = await Passing(linked.front).complete.answer(request)
        sending = asyncio.ensure_future(response(SCOPE, nothing, nothing))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert not endless.gone.is_set(), "the control: it is sent while the client is there"
        request.departure.tell()
        await sending
        await endless.gone.wait()

    ran(run())


def test_the_collector_may_find_a_head_in_the_middle_of_a_write() -> None:
    """A frame that is being written is neither cut in two nor sent again."""

    async def run() -> None:
        linked = Linked(Answers(made))
        head = linked.front.introduce(SCOPE)
        other = linked.front.introduce(SCOPE)

        class Collecting(bytearray):
            def __len__(self) -> int:
                linked.front.forget(other)
                return super().__len__()

        answers = [linked.front.ask(head, body) for body in (BODY, Collecting(BODY), BODY)]
        assert await asyncio.gather(*answers) == [Answer(*MADE)] * 3
        await asyncio.sleep(0.01)
        assert list(linked.back._heads) == [head]

    ran(run())
