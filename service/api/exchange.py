"""Requests in and answers out on one connection, each in one piece where it can be.

uvicorn tells the application of a request as soon as its head is here, and starts a timer whenever
a connection rests. Most predictions bring their body along or right behind, and keep the connection
busy: those are asked for their answer once they are whole (`complete`), and the time of rest is
looked at now and then.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn._types import HTTPScope
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.api.complete import Complete, Layer, answering
from service.api.whole import answering_whole

_HOLD_SECONDS = 0.02
"""How long the application may be told later of a head whose small body is not here yet."""
_FORWARDED = b"x-forwarded-"
_CONTINUE = b"100-continue"


class Exchange(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layers: Layer | None = getattr(self.config.app, "complete", None)
        self._reading = self._forwarded = False
        self._held: tuple[RequestResponseCycle, Any] | None = None
        self._hold_timer: asyncio.TimerHandle | None = None
        self._complete: Complete | None = None
        self._resting_since: float | None = None

    # ---- in -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse, and begin what has come; a head whose body is not here yet may be held."""
        self._reading = True
        super().data_received(data)
        self._reading = False
        if self.transport.is_closing():
            self._held = None
        elif self._held is not None:
            self._wait_for_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what is held, and tell a complete request under way that its client left."""
        self._held = None
        for timer in (self._hold_timer, self.timeout_keep_alive_task):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        if self._complete is not None and not self._idle:
            self._complete.depart()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._forwarded = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, and note what only messages can serve."""
        name = name.lower()
        if name == b"expect":
            self.expect_100_continue |= value.lower() == _CONTINUE
        elif name.startswith(_FORWARDED):
            self._forwarded = True
        self.headers.append((name, value))

    def on_message_complete(self) -> None:
        """The body is whole: a request that was held is complete."""
        super().on_message_complete()
        if self._held is not None:
            self._answer_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._reading and self._may_be_complete(cycle.scope):
            self._held = cycle, app
        else:
            self._start(cycle, answering_whole(app, cycle))

    def _start(self, cycle: RequestResponseCycle, app: Any) -> asyncio.Task[None]:
        task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def _may_be_complete(self, scope: HTTPScope) -> bool:
        """Whether to look what else comes with a head, before the application is told of it.

        Headers of proxies are left to uvicorn's own layer, which only messages pass.
        """
        return (
            self._layers is not None
            and scope["method"] == "POST"
            and not (self._forwarded or self.expect_100_continue or self.root_path)
            and self._layers.takes(scope["path"])
        )

    def _wait_for_rest(self) -> None:
        """Many clients send a body right behind its head, in a packet of its own."""
        if self._hold_timer is None:
            length = dict(self.headers).get(b"content-length", b"")
            if len(length) < 8 and length.isdigit() and int(length) <= HIGH_WATER_LIMIT:
                self._hold_timer = self.loop.call_later(_HOLD_SECONDS, self._begin_held)
            else:  # uvicorn would read no further before the application does
                self._begin_held()

    def _begin_held(self) -> None:
        """Let the application ask for the body."""
        cycle, app = self._taken_from_hold()
        if not self.transport.is_closing():
            self._start(cycle, answering_whole(app, cycle))

    def _taken_from_hold(self) -> tuple[RequestResponseCycle, Any]:
        if self._hold_timer is not None:
            self._hold_timer.cancel()
            self._hold_timer = None
        assert self._held is not None
        held, self._held = self._held, None
        return held

    def _answer_complete(self) -> None:
        assert self._layers is not None
        cycle, _ = self._taken_from_hold()
        content, cycle.body = cycle.body, bytearray()
        cycle.message_event.clear()
        self.flow.resume_reading()  # or a client that leaves would not be noticed
        scope: Any = cycle.scope
        scope["app"] = self.config.app
        receive: Any = cycle.receive
        self._complete = request = Complete(scope, receive, content)
        request.task = self._start(cycle, answering(self._layers, request, cycle))

    # ---- out ----------------------------------------------------------------------------

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        """Begin what was pipelined, or rest."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._rest()

    def _rest(self) -> None:
        """Nothing is under way: close the connection unless something comes in time.

        One timer goes on through all requests and looks how long the last pause is.
        """
        self._resting_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_after(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        """Called by uvicorn when something comes."""
        self._resting_since = None

    def _look_after(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self._look_how_long)

    def _look_how_long(self) -> None:
        self.timeout_keep_alive_task = None
        if self._resting_since is None:
            return
        left = self._resting_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._look_after(left)
        else:
            self.timeout_keep_alive_handler()
