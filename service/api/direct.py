"""Routes that skip FastAPI's machinery and keep their place in its documentation.

The hot routes read their request themselves: solving declared parameters costs several times as
much as a small network's whole forward pass. The declared signature is still what OpenAPI shows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectRoute(APIRoute):
    """Calls the function that `direct` marked on the endpoint, with the request alone."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        serve: Endpoint = vars(self.endpoint)["serve"]

        async def handler(request: Request) -> Response:
            return await serve(request)

        return handler


def direct(serve: Endpoint) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `serve` answers the request, the decorated function documents it."""

    def mark(documented: Callable[..., Any]) -> Callable[..., Any]:
        vars(documented)["serve"] = serve
        return documented

    return mark
