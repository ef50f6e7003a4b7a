"""What an HTTP process makes of whole requests; the rest is in `test_fronts` and `tests/relay`."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from service.api.complete import Complete, Head, InMessages
from service.api.known import MadeResponse
from service.api.relayed import Passing
from service.relay import wire
from tests.relay.test_back import SCOPE
from tests.relay.test_whole import BODY, MADE, Answers, Linked, echo, made, ran


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
