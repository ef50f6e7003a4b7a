"""What happens around every request: its id, its metrics, its log line, the security headers.

Plain ASGI, because each layer of function middleware would cost the hot path a task and a queue.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterable
from typing import cast

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import problems
from service.api.complete import BEGAN, Complete, Layer
from service.api.metrics import Metrics
from service.api.request_id import CURRENT, HEADER
from service.api.security_headers import SECURITY_HEADERS

_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

_SECURITY_PAIRS = tuple((name.encode(), value.encode()) for name, value in SECURITY_HEADERS)
_SECURITY_NAMES = frozenset(name for name, _ in _SECURITY_PAIRS)
CLIENT_LEFT = 499
# Ids have to differ, not to be secret, and the system's entropy costs several times as much.
_RANDOM = random.Random()

log = structlog.get_logger("foldserve.access")


class AroundEveryRequest:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool) -> None:
        self._app = cast(Layer, app)
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; what it raises is answered as a problem and logged.

        Only once an answer has begun is the exception raised again, which cuts the answer off. A
        client that left is no error, and scopes other than HTTP are passed on as they are.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = self._begin(scope)

        async def decorated(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                message["headers"] = visit.completed(message["headers"])
            await send(message)

        try:
            await self._app(scope, receive, decorated)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception:
            _log_unexpected(scope)
            if visit.status != CLIENT_LEFT:  # the response has begun: only to cut it off is honest
                raise
            await problems.internal_error(scope["path"])(scope, receive, decorated)
        finally:
            self._end(visit)

    async def answer(self, request: Complete) -> Response:
        """See `complete.Layer`."""
        visit = self._begin(request.scope)
        try:
            response = await self._answer(request)
            visit.status = response.status_code
        finally:
            self._end(visit)
        response.raw_headers = visit.completed(response.raw_headers)
        return response

    async def _answer(self, request: Complete) -> Response:
        try:
            return await self._app.answer(request)
        except ClientDisconnect:
            raise
        except Exception:
            _log_unexpected(request.scope)
            return problems.internal_error(request.scope["path"])

    def _begin(self, scope: Scope) -> _Visit:
        visit = _Visit(scope)
        scope.setdefault("state", {})["request_id"] = visit.id
        self._metrics.began()
        return visit

    def _end(self, visit: _Visit) -> None:
        seconds = time.perf_counter() - visit.start
        scope = visit.scope
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.ended(route, _method(scope["method"]), visit.status, seconds)
        if self._access_log:
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=visit.status,
                milliseconds=round(seconds * 1e3, 2),
            )
        CURRENT.reset(visit.token)


class _Visit:
    """One request; until it has an answer its status is that of a client who left."""

    __slots__ = ("id", "scope", "start", "status", "token")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.start: float = scope.get("state", {}).pop(BEGAN, None) or time.perf_counter()
        self.id = _request_id(scope)
        self.status = CLIENT_LEFT
        self.token = CURRENT.set(self.id)

    def completed(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The response's headers with the request's id and the security headers that it lacks."""
        given = list(headers)
        names = {name for name, _ in given}
        given.append((HEADER, self.id.encode()))
        if _SECURITY_NAMES.isdisjoint(names):
            given += _SECURITY_PAIRS
        else:
            given += [pair for pair in _SECURITY_PAIRS if pair[0] not in names]
        if _draining(self.scope):
            given.append((b"connection", b"close"))
        return given


def _log_unexpected(scope: Scope) -> None:
    log.exception("unexpected error", method=scope["method"], path=scope["path"])


def _draining(scope: Scope) -> bool:
    """Whether the service is about to end, so that clients should not keep their connections."""
    service = getattr(scope["app"].state, "service", None)
    return service is not None and service.draining


def _request_id(scope: Scope) -> str:
    """The client's id when it is harmless in a log and a header, else a new one."""
    for name, value in scope["headers"]:
        if name == HEADER and _ACCEPTED_ID.fullmatch(value):
            given: str = value.decode("ascii")
            return given
    return f"{_RANDOM.getrandbits(128):032x}"


def _method(method: str) -> str:
    """The method as a metric label; invented methods share one, or a client could make series."""
    return (
        method
        if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        else "other"
    )
