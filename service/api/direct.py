"""Routes that skip FastAPI's machinery and keep their place in its documentation.

The hot routes read their request themselves: solving declared parameters costs several times as
much as a small network's whole forward pass, and so does finding the route among all the others
through FastAPI's own layers. `DirectDispatch` therefore stands in front of those layers and behind
every other middleware: ids, keys, limits and headers are the same for direct routes as for others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import lru_cache
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import problems
from service.errors import FoldserveError

Endpoint = Callable[[Request], Awaitable[Response]]
_KNOWN_PATHS = 1024  # addresses whose route is remembered
_LONGEST_PATH = 256  # characters; longer ones hold no valid name, and would be memory for strangers


class DirectRoute(APIRoute):
    """Calls the function that `direct` marked on the endpoint, with the request alone."""

    @property
    def serve(self) -> Endpoint:
        """The function that `direct` was given. Raises KeyError where `direct` was not used."""
        endpoint: Endpoint = vars(self.endpoint)["serve"]
        return endpoint

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Call `serve` where `DirectDispatch` passed a request on; no parameter is solved."""

        async def handler(request: Request) -> Response:
            return await self.serve(request)

        return handler


class Template:
    """What a scope says of the route that matched it: its template, as metrics label it."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class DirectDispatch:
    """The innermost ASGI middleware: serves POST requests for direct routes, passes on the rest.

    A direct route is still registered with FastAPI, which documents it and answers other methods.
    """

    def __init__(self, app: ASGIApp, routers: Iterable[tuple[str, APIRouter]]) -> None:
        """`routers` hold direct routes (others are left alone), each with its prefix."""
        self._app = app
        routes = [
            (Template(prefix + route.path), compile_path(prefix + route.path)[0], route.serve)
            for prefix, router in routers
            for route in router.routes
            if isinstance(route, DirectRoute) and "POST" in (route.methods or ())
        ]

        @lru_cache(_KNOWN_PATHS)
        def find(path: str) -> tuple[Template, Endpoint, tuple[tuple[str, str], ...]] | None:
            for template, pattern, serve in routes:
                if found := pattern.match(path):
                    return template, serve, tuple(found.groupdict().items())
            return None

        self._find = find

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a POST to a direct route, own errors as problems; pass anything else on."""
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and not scope.get("root_path")  # FastAPI's router has to take that off first
            and self.takes(scope["path"])
        ):
            response = await self.answer(Request(scope, receive))
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def takes(self, path: str) -> bool:
        """Whether a POST to that path is for a direct route."""
        return len(path) <= _LONGEST_PATH and self._find(path) is not None

    async def answer(self, request: Request) -> Response:
        """What the route of a request that `takes` allows answers, its errors as problems."""
        scope = request.scope
        found = self._find(scope["path"])
        assert found is not None
        scope["route"], serve, parameters = found
        scope["path_params"] = dict(parameters)
        try:
            return await serve(request)
        except FoldserveError as error:
            return problems.error_response(error, scope["path"])


def direct(serve: Endpoint) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `serve` answers the request, the decorated function documents it."""

    def mark(documented: Callable[..., Any]) -> Callable[..., Any]:
        vars(documented)["serve"] = serve
        return documented

    return mark
