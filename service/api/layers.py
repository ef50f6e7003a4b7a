"""The application with its own layers around FastAPI's instead of between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp

from service.api.complete import Layer, Shortcut
from service.api.direct import DirectDispatch


class Application(FastAPI):
    """FastAPI without its outermost layers, whose work is done by the middleware here.

    FastAPI puts three of its own in front of what `add_middleware` adds: they answer errors that
    nobody expected, tell telemetry of them and limit bodies. `AroundEveryRequest` does the first,
    for the middleware too, `tracing` the second and `bodies` the third. So a request would pass
    them for nothing, and the first would answer in a form of its own before ours sees the error.
    """

    complete: Shortcut | None = None
    """How requests are answered that are here in one piece; None if a layer wants messages."""

    def build_middleware_stack(self) -> ASGIApp:
        """What was added, the last one outermost, around FastAPI from its known errors inwards."""
        added, self.user_middleware = self.user_middleware, []
        layers: Any = super().build_middleware_stack()
        self.user_middleware = added
        while not isinstance(layers, ExceptionMiddleware):
            layers = layers.app
        built = [layers]
        for layer, arguments, options in reversed(added):
            built.append(layer(built[-1], *arguments, **options))
        self.complete = _shortcut(built[1:])
        stack: ASGIApp = built[-1]
        return stack


def _shortcut(layers: Sequence[Any]) -> Shortcut | None:
    """Through all of them, the innermost first, if there is a way."""
    if all(isinstance(layer, Layer) for layer in layers) and layers:
        innermost, outermost = layers[0], layers[-1]
        if isinstance(innermost, DirectDispatch):
            return Shortcut(innermost.takes, outermost.answer)
    return None
