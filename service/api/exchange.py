"""Requests in and answers out on one connection, each in one piece where it can be.

uvicorn tells the application of a request as soon as its head is here, and starts a timer whenever
a connection becomes idle. Most predictions bring their body along or right behind, and keep the
connection busy: those are asked for their answer once they are whole (`complete`), and how long a
connection has been idle is looked at now and then.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.complete import BEGAN, Complete, InMessages, Shortcut
from service.api.known import MadeResponse
from service.api.whole import answering_whole, write, write_lines

HOLD_SECONDS = 0.02
"""How long the application may be told later of a head whose small body is not here yet.

A head that the connection knows may be held so long before it is parsed, and once more after that.
"""
_FORWARDED = b"x-forwarded-"


class Exchange(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shortcut: Shortcut | None = getattr(self.config.app, "complete", None)
        self._reading = False
        self._held: RequestResponseCycle | None = None
        self._hold_timer: asyncio.TimerHandle | None = None
        self._served: RequestResponseCycle | None = None
        self._complete: Complete | None = None
        self._idle_since: float | None = None

    # ---- in -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, and begin what has come; a head whose body is not here yet may be held."""
        self._reading = True
        super().data_received(data)
        self._reading = False
        if self.transport.is_closing():
            self._held = None
        elif self._held is not None:
            self._wait_for_rest(self._held)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what is held, and tell a complete request under way that its client left."""
        self._held = None
        for timer in (self._hold_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self._served is not None:  # uvicorn tells only the newest of those that were pipelined
            self._served.disconnected = True
            self._served.message_event.set()
        if self._complete is not None:
            self._complete.departure.tell()
        self._served = self._complete = None

    def on_message_complete(self) -> None:
        """The body is whole: a request that was held is complete."""
        super().on_message_complete()
        if self._held is not None:
            self._answer_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._reading and app is self.app and self._may_be_complete(cycle.scope):
            self._held = cycle
        else:
            self._served = cycle
            super()._start_asgi_task(cycle, answering_whole(app, cycle))  # type: ignore[arg-type]

    def _may_be_complete(self, scope: HTTPScope) -> bool:
        """Whether to look what else comes with a head, before the application is told of it.

        Headers of proxies are left to uvicorn's own layer, which only messages pass.
        """
        return (
            self._shortcut is not None
            and scope["method"] == "POST"
            and not (self.expect_100_continue or self.root_path)
            and self._shortcut.takes(scope["path"])
            and not any(name.startswith(_FORWARDED) for name, _ in scope["headers"])
        )

    def _wait_for_rest(self, cycle: RequestResponseCycle) -> None:
        """Many clients send a body right behind its head, in a packet of its own."""
        if self._hold_timer is not None:
            return
        cycle.scope["state"].setdefault(BEGAN, time.perf_counter())
        length = dict(cycle.scope["headers"]).get(b"content-length", b"")
        if len(length) < 8 and length.isdigit() and int(length) <= HIGH_WATER_LIMIT:
            self._hold_timer = self.loop.call_later(HOLD_SECONDS, self._begin_held)
        else:  # uvicorn would read no further before the application does
            self._begin_held()

    def _begin_held(self) -> None:
        """Let the application ask for the body."""
        cycle = self._taken_from_hold()
        if not self.transport.is_closing():
            self._start_asgi_task(cycle, self.app)

    def _taken_from_hold(self) -> RequestResponseCycle:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
        assert self._held is not None
        held, self._held = self._held, None
        return held

    def _answer_complete(self) -> None:
        """What is held is here as a whole."""
        cycle = self._taken_from_hold()
        content, cycle.body = cycle.body, bytearray()
        cycle.message_event.clear()
        self.flow.resume_reading()  # or a client that leaves would not be noticed
        scope: Any = cycle.scope
        scope["app"] = self.config.app
        receive: Any = cycle.receive
        self._serve(cycle, Complete(scope, receive, content))

    def _serve(self, cycle: RequestResponseCycle, request: Complete) -> None:
        self._served, self._complete = cycle, request
        task = self.loop.create_task(self._answer_whole(cycle, request))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _answer_whole(self, cycle: RequestResponseCycle, request: Complete) -> None:
        """Send the answer in one piece; as an application's, if it is not or nobody made one."""
        assert self._shortcut is not None
        app: Any = None
        try:
            app = await self._shortcut.answer(request)
            if _written(cycle, app):
                return
        except ClientDisconnect:
            return
        except BaseException as error:  # also the end of the drain, as for any application
            app = partial(_raise, error)
        finally:
            if app is None or cycle.response_complete:
                cycle.on_response = _nothing  # or it would keep the connection, which keeps it
        await cycle.run_asgi(app)
        del app  # an error knows this frame

    # ---- out ----------------------------------------------------------------------------

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Begin what was pipelined, or wait for what comes next."""
        self._served = self._complete = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._start_keep_alive()

    def _start_keep_alive(self) -> None:
        """Nothing is under way: close the connection unless something comes in time.

        One timer goes on through all requests and looks how long the connection has been idle.
        """
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._check_keep_alive_in(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        """Called by uvicorn when something comes."""
        self._idle_since = None

    def _check_keep_alive_in(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self._check_keep_alive)

    def _check_keep_alive(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._check_keep_alive_in(left)
        else:
            self.timeout_keep_alive_handler()


def _nothing() -> None:
    return None


async def _raise(error: BaseException, *_: object) -> None:
    raise error


def _written(cycle: RequestResponseCycle, response: Response) -> bool:
    """Whether the response could be sent in one piece."""
    if response.background is not None or isinstance(response, InMessages):
        return False
    if isinstance(response, MadeResponse):
        return write_lines(cycle, response.status_code, response.lines, response.body)
    return write(cycle, response.status_code, response.raw_headers, response.body)
