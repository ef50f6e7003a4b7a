from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from service.api.security_headers import SECURITY_HEADERS
from service.api.whole import answering_whole

LOG = logging.getLogger(__name__)
LENGTH = (b"content-length", b"5")
SECURITY = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS]


class Transport(asyncio.Transport):
    """Remembers what was written, and that it was closed."""

    def __init__(self) -> None:
        self.written: list[bytes] = []

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.written.append(b"(closed)")


def answered(
    headers: list[tuple[bytes, bytes]],
    pieces: list[bytes],
    *,
    method: str = "POST",
    keep_alive: bool = True,
    whole: bool = True,
) -> list[bytes]:
    """What is written of an answer in those pieces; with `whole` False by uvicorn alone."""
    transport = Transport()
    ended: list[bool] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        for number, piece in enumerate(pieces, 1):
            more = number < len(pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    async def run() -> None:
        scope: Any = {"type": "http", "method": method, "http_version": "1.1"}
        cycle = RequestResponseCycle(
            scope, transport, FlowControl(transport), LOG, LOG, False, [(b"date", b"today")],
            asyncio.Event(), True, keep_alive, lambda: ended.append(True),
        )  # fmt: skip
        serve = answering_whole(app, cycle) if whole else app
        await serve(scope, cycle.receive, cycle.send)
        assert cycle.response_complete
        assert not cycle.waiting_for_100_continue
        assert cycle.message_event.is_set()

    asyncio.run(run())
    assert ended == [True]
    return transport.written


def test_a_whole_answer_is_written_at_once_and_as_uvicorn_would() -> None:
    headers = [(b"retry-after", b"1"), LENGTH, *SECURITY]
    (written,) = answered(headers, [b"hello"])
    plain = answered(headers, [b"hello"], whole=False)
    assert len(plain) == 2
    assert written == b"".join(plain)


@pytest.mark.parametrize(
    ("headers", "pieces", "more"),
    [
        ([], [b"hello"], {}),  # its length is not declared
        ([LENGTH], [b"he", b"llo"], {}),
        ([LENGTH], [b""], {"method": "HEAD"}),
        ([LENGTH, (b"connection", b"close")], [b"hello"], {}),
        ([LENGTH], [b"hello"], {"keep_alive": False}),
        ([(b"content-length", b"%d" % (1 << 17))], [bytes(1 << 17)], {}),
    ],
)
def test_any_other_answer_is_left_to_uvicorn(
    headers: list[tuple[bytes, bytes]], pieces: list[bytes], more: dict[str, Any]
) -> None:
    written = answered(headers, pieces, **more)
    assert written == answered(headers, pieces, whole=False, **more)


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ([LENGTH, (b"a", b"b\r\nc: d")], "Invalid HTTP header value"),
        ([LENGTH, (b"a:", b"b")], "Invalid HTTP header name"),
        ([(b"content-length", b"4")], "longer than Content-Length"),
        ([(b"content-length", b"6")], "shorter than Content-Length"),
    ],
)
def test_what_would_break_the_connection_is_refused_as_before(
    headers: list[tuple[bytes, bytes]], error: str
) -> None:
    with pytest.raises(RuntimeError, match=error):
        answered(headers, [b"hello"])


def test_an_answer_that_fails_before_its_body_was_begun_and_is_cut_off() -> None:
    transport = Transport()

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [LENGTH]})
        raise OSError("the file is gone")

    async def run() -> bool:
        scope: Any = {"type": "http", "method": "GET", "http_version": "1.1"}
        cycle = RequestResponseCycle(
            scope, transport, FlowControl(transport), LOG, LOG, False, [],
            asyncio.Event(), True, True, lambda: None,
        )  # fmt: skip
        with pytest.raises(OSError, match="the file is gone"):
            await answering_whole(app, cycle)(scope, cycle.receive, cycle.send)
        return cycle.response_started and not cycle.response_complete

    assert asyncio.run(run())
    (head,) = transport.written
    assert head.startswith(b"HTTP/1.1 200 ")
