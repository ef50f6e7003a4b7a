"""Which scope a request needs: one table, read before anything of the request is.

    open      life and readiness, the pages' own files, the description of the API
    read      everything else that is asked with GET, downloads and metrics included
    predict   predictions, and what a /v2 client reads about a model before it infers
    write     everything that changes something or takes the machine: uploads, defaults, patches,
              deletions, loading and unloading, benchmarks

What the table does not name needs `read` for GET and HEAD and `write` for any other method, so a
route that somebody adds is closed until it is opened here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from service.api import problems
from service.api.schemas import Problem
from service.api.v2 import errors as v2_errors
from service.api.v2.documented import ErrorAnswer
from service.store import Scope

OPEN_PATHS = frozenset(
    {
        "/health/live",
        "/health/ready",
        "/v2/health/live",
        "/v2/health/ready",
        "/openapi.json",
        "/docs",
        "/problems",
        "/login",
        "/logout",
        "/favicon.ico",
    }
)
OPEN_PREFIXES = ("/static/", "/problems/")

_READ = frozenset({Scope.READ})
_PREDICT = frozenset({Scope.PREDICT})
_WRITE = frozenset({Scope.WRITE})
_READ_OR_PREDICT = _READ | _PREDICT
_READING = ("GET", "HEAD")

_PROBLEM = {problems.MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
_V2_ERROR = {"application/json": {"schema": ErrorAnswer.model_json_schema()}}


def needed(method: str, path: str) -> frozenset[Scope] | None:
    """The scopes of which a request needs one, or None if it needs no key."""
    if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
        return None
    if method in _READING:
        return _READ_OR_PREDICT if path == "/v2" or path.startswith("/v2/") else _READ
    if method == "POST":
        if path.startswith("/v2/models/") and path.endswith("/infer"):
            return _PREDICT
        if path.startswith("/v1/models/") and path.endswith("/predict"):
            return _PREDICT
        if path == "/v2/repository/index":
            return _READ_OR_PREDICT
    return _WRITE


def describe(app: FastAPI) -> None:
    """Let the OpenAPI document say which scope each operation needs and how it is refused."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _annotate(original())
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _annotate(openapi: dict[str, Any]) -> None:
    openapi.setdefault("components", {})["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key; needed unless the service listens on loopback only.",
        }
    }
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            scopes = needed(method.upper(), path)
            answers = operation["responses"]
            content = _V2_ERROR if v2_errors.speaks_v2(path) else _PROBLEM
            for status, code in (("421", "host_not_allowed"), ("429", "rate_limited")):
                _add(answers, status, code, content)
            if method.upper() not in _READING:
                _add(answers, "403", "origin_not_allowed", content)
            if scopes is None:
                continue
            operation["security"] = [{"key": []}]
            words = " or ".join(f"`{scope}`" for scope in sorted(scopes))
            operation["description"] = (
                f"{operation.get('description', '')}\n\nScope of the API key: {words}."
            ).strip()
            _add(answers, "401", "unauthorized", content)
            _add(answers, "403", "forbidden", content)


def _add(answers: dict[str, Any], status: str, code: str, content: dict[str, Any]) -> None:
    """One more problem code among an operation's answers."""
    answer = answers.setdefault(status, {"description": "Problem: .", "content": content})
    text = answer["description"]
    if f"`{code}`" not in text and text.endswith("."):
        answer["description"] = (
            f"Problem: `{code}`." if text == "Problem: ." else f"{text[:-1]}, `{code}`."
        )
