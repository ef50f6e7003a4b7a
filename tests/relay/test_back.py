"""The back alone: frames however they are cut, frames that make no sense, borrowed memory."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from service.relay import memory, wire
from service.relay.back import BODY_VIEWS, Back
from service.relay.front import Front

SIZE = 1 << 20
SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/über/\u2028",
    "raw_path": b"/%C3%BCber/%E2%80%A8",
    "query_string": b"a=%FF&b",
    "root_path": "",
    "headers": [(b"host", b"x"), (b"x-bytes", bytes(range(0x80, 0x100))), (b"host", b"y")],
    "client": ("127.0.0.1", 5),
    "server": ("::1", 80),
}


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written += data


def frame(kind: int, number: int, payload: bytes = b"") -> bytes:
    """What a link writes."""
    link, transport = wire.Link(), Transport()
    link.connection_made(transport)  # type: ignore[arg-type]
    link.write(kind, number, payload)
    return transport.written


def ran(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    await receive()


def back(app: Any = _nothing, data: bytes = b"") -> tuple[Back, Transport]:
    """A back with `data` at the beginning of its memory."""
    descriptor = memory.create(SIZE)
    memory.writable(descriptor)[: len(data)] = data
    made = Back(app, memory.readable(descriptor), set(), lambda: None, lambda: None)
    os.close(descriptor)
    transport = Transport()
    made.connection_made(transport)  # type: ignore[arg-type]
    return made, transport


def test_a_scope_comes_through_as_it_is() -> None:
    assert wire.unpack_scope(wire.pack_scope(SCOPE)) == SCOPE
    without = SCOPE | {"client": None, "server": None}
    assert wire.unpack_scope(wire.pack_scope(without)) == without


def test_frames_may_be_cut_anywhere() -> None:
    sent = [(wire.DATA, 7, b"abc"), (wire.GONE, 2**40, b""), (wire.BODY, 1, b"\0" * 300)]
    stream = b"".join(frame(*each) for each in sent)
    for step in (1, 2, 13, 14, 200, len(stream)):
        found: list[tuple[int, int, bytes]] = []
        link = wire.Link()
        link.received = lambda *each, to=found: to.append(each)  # type: ignore[method-assign]
        for at in range(0, len(stream), step):
            link.data_received(stream[at : at + step])
        assert found == sent


@pytest.mark.parametrize(
    "wrong",
    [
        wire._HEAD.pack(wire.DATA, 1, 1 << 31),  # a frame that would never end
        frame(wire.PLACED, 1, wire.PLACE.pack(0, SIZE - 1, 2, False)),  # beyond the memory
        frame(wire.PLACED, 1, wire.PLACE.pack(0, 2**63, 1, False)),
        frame(wire.PLACED, 1, b"short"),
        frame(wire.OPEN, 1, b"no json"),
        frame(wire.OPEN, 1, b"[]"),
        frame(99, 1),
    ],
)
def test_a_front_that_talks_nonsense_is_cut_off(wrong: bytes) -> None:
    """The loop ends a connection whose protocol raises, and a new front takes its place."""

    async def run() -> None:
        for good in (frame(wire.HELLO, 0), frame(wire.GONE, 5)):
            back()[0].data_received(good)
        with pytest.raises(Exception, match=r".") as raised:
            back()[0].data_received(wrong)
        assert not isinstance(raised.value, AssertionError)

    ran(run())


def test_a_place_is_freed_when_nothing_refers_to_it_and_not_before() -> None:
    kept: list[Any] = []

    async def keeps(scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"][BODY_VIEWS]()
        body = (await receive())["body"]
        kept.append(np.frombuffer(body, np.float32)[2:].reshape(1, -1))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def run() -> None:
        rows = np.arange(8, dtype=np.float32)
        made, transport = back(keeps, rows.tobytes())
        made.data_received(frame(wire.OPEN, 1, wire.pack_scope(SCOPE)))
        made.data_received(frame(wire.PLACED, 1, wire.PLACE.pack(0, 0, 32, False)))
        await asyncio.sleep(0.01)
        gc.collect()
        freed = frame(wire.FREE, 0, wire.COUNT.pack(0))
        assert transport.written.endswith(frame(wire.END, 1))
        assert freed not in transport.written, "its rows are still there"
        assert kept[0].tolist() == [[2, 3, 4, 5, 6, 7]]
        assert not kept[0].flags.writeable
        kept.clear()
        await asyncio.sleep(0.01)
        assert transport.written.endswith(freed)

    ran(run())


def test_what_was_not_lent_cannot_come_back() -> None:
    async def run() -> None:
        descriptor = memory.create(SIZE)
        front = Front(memory.writable(descriptor), lambda: None, lambda: None)
        os.close(descriptor)
        with pytest.raises(KeyError):
            front.data_received(frame(wire.FREE, 0, wire.COUNT.pack(4096)))

    ran(run())
