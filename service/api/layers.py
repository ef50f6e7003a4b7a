"""The application with its own layers around FastAPI's instead of between them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp


class Application(FastAPI):
    """FastAPI, whose layers a request passes only if none of the middleware has answered it.

    FastAPI puts four of its own in front of what `add_middleware` adds. They would look after the
    errors of the middleware, which has its own layer for that, and cost as much as a direct route.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """What was added, the last one outermost, around everything that is FastAPI's."""
        added, self.user_middleware = self.user_middleware, []
        stack = super().build_middleware_stack()
        self.user_middleware = added
        for layer, arguments, options in reversed(added):
            stack = layer(stack, *arguments, **options)
        return stack
