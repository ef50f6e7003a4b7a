"""The application with its own layers around FastAPI's instead of between them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp

from service.api.complete import Layer


class Application(FastAPI):
    """FastAPI without its outermost layers, whose work is done by the middleware here.

    FastAPI puts three of its own in front of what `add_middleware` adds: they answer errors that
    nobody expected, tell telemetry of them and limit bodies. `AroundEveryRequest` does the first,
    for the middleware too, `tracing` the second and `bodies` the third. So a request would pass
    them for nothing, and the first would answer in a form of its own before ours sees the error.
    """

    complete: Layer | None = None
    """The layers, for requests that are here in one piece; None if one of them wants messages."""

    def build_middleware_stack(self) -> ASGIApp:
        """What was added, the last one outermost, around FastAPI from its known errors inwards."""
        added, self.user_middleware = self.user_middleware, []
        layers: Any = super().build_middleware_stack()
        self.user_middleware = added
        while not isinstance(layers, ExceptionMiddleware):
            layers = layers.app
        for layer, arguments, options in reversed(added):
            layers = layer(layers, *arguments, **options)
        if added and all(hasattr(layer, "answer") for layer, _, _ in added):
            self.complete = layers
        stack: ASGIApp = layers
        return stack
