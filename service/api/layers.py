"""The application with its own layers around FastAPI's instead of between them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp


class Application(FastAPI):
    """FastAPI, whose layers a request passes only if none of the middleware has answered it.

    FastAPI puts three of its own in front of what `add_middleware` adds: they catch errors, tell
    telemetry of them and limit bodies, all of which is done elsewhere here, at a price for each
    request. The errors of the middleware are caught by the outermost, `AroundEveryRequest`.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """What was added, the last one outermost, around everything that is FastAPI's."""
        added, self.user_middleware = self.user_middleware, []
        stack = super().build_middleware_stack()
        self.user_middleware = added
        for layer, arguments, options in reversed(added):
            stack = layer(stack, *arguments, **options)
        return stack
