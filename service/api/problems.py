"""Errors as RFC 9457 problem documents; the one place that knows which error has which status.

Every response that is not a success has the type `application/problem+json` and the members `type`,
`title`, `status`, `detail`, `instance`, `code` and `remedy`, beside whatever facts the error holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import errors
from service.api.encoding import json_bytes
from service.api.known import KnownResponse
from service.api.v2 import errors as v2_errors
from service.errors import FoldserveError

MEDIA_TYPE = "application/problem+json"

# The nearest ancestor in the table counts, so a class that is not named here has its parent's row.
STATUS: dict[type[FoldserveError], HTTPStatus] = {
    FoldserveError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.CheckpointError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.RecognitionError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.GraphError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.FusionError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.ExportError: HTTPStatus.CONFLICT,
    errors.FormatNotInstalled: HTTPStatus.NOT_IMPLEMENTED,
    errors.ConversionError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.ConversionInterrupted: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StoreError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.ModelNotFound: HTTPStatus.NOT_FOUND,
    errors.VersionNotFound: HTTPStatus.NOT_FOUND,
    errors.NameInvalid: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.VersionNotReady: HTTPStatus.CONFLICT,
    errors.ModelUnloaded: HTTPStatus.CONFLICT,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.FormNotAvailable: HTTPStatus.NOT_FOUND,
    errors.NotServable: HTTPStatus.CONFLICT,
    errors.UploadTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.StorageFull: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.AccessError: HTTPStatus.FORBIDDEN,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    errors.HostNotAllowed: HTTPStatus.MISDIRECTED_REQUEST,
    errors.UrlTooLong: HTTPStatus.REQUEST_URI_TOO_LONG,
    errors.HeadTooLarge: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    errors.KeyNotFound: HTTPStatus.NOT_FOUND,
    errors.ServingError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.BadInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.ImageTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.RequestStalled: HTTPStatus.REQUEST_TIMEOUT,
    errors.QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    errors.DeadlineExceeded: HTTPStatus.GATEWAY_TIMEOUT,
    errors.ModelFaulty: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.NotLoaded: HTTPStatus.SERVICE_UNAVAILABLE,
}

# Answers of the framework itself: code, title, remedy.
_FRAMEWORK: dict[int, tuple[str, str, str]] = {
    404: ("not_found", "There is nothing at this address", "See /docs for the routes."),
    405: (
        "method_not_allowed",
        "This address does not take that method",
        "Use one of the methods in the Allow header.",
    ),
}
_MALFORMED = (
    "malformed_request",
    "This is not HTTP as it is understood here",
    "Send HTTP/1.1 as any client does.",
)
_BUSY = (
    "too_many_connections",
    "The service holds as many connections as it may",
    "Close connections that are not needed, or raise FOLDSERVE_MAX_CONNECTIONS.",
)
_INVALID = (
    "invalid_request",
    "The request does not fit the route",
    "Correct the named parameters; /docs shows what the route takes.",
)
_INTERNAL = (
    "internal_error",
    "The service failed",
    "Repeat the request; if it fails again, report it with its request id.",
)

log = structlog.get_logger("foldserve.api")


def status_of(kind: type[FoldserveError]) -> HTTPStatus:
    """The HTTP status of an error class."""
    return next(STATUS[ancestor] for ancestor in kind.__mro__ if ancestor in STATUS)


def document(
    error: FoldserveError | Mapping[str, Any], instance: str | None = None, **extra: Any
) -> dict[str, Any]:
    """The problem document of an error, or of one stored as `to_dict` gave it."""
    if not isinstance(error, FoldserveError):
        error = FoldserveError.from_dict(dict(error))
    kind = type(error)
    row = _ROWS.get(kind) or _row(kind)
    problem: dict[str, Any] = {**row.head, "detail": error.detail}
    if instance is not None:
        problem["instance"] = instance
    problem["code"] = row.code
    problem["remedy"] = error.remedy
    for name, value in (error.extra | extra).items():
        problem.setdefault(name, value)  # no further fact hides a standard member
    return problem


@dataclass(frozen=True)
class _Row:
    """What the documents of one error class have in common."""

    head: Mapping[str, Any]
    code: str


_ROWS: dict[type[FoldserveError], _Row] = {}


def _row(kind: type[FoldserveError]) -> _Row:
    code, status = kind.code(), status_of(kind).value
    head = {"type": f"/problems/{code}", "title": kind.title, "status": status}
    return _ROWS.setdefault(kind, _Row(head, code))


def response(body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """A problem document as a response with its own status; under `/v2` as that protocol has it."""
    if v2_errors.speaks_v2(str(body.get("instance", ""))):
        return v2_errors.response(body, headers)
    own = headers.items() if headers else ()
    return KnownResponse(json_bytes(body), MEDIA_TYPE, own=own, status=body["status"])


def error_response(error: FoldserveError, instance: str) -> Response:
    """The response for an error raised while serving `instance` (a path)."""
    problem = document(error, instance)
    if problem["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.error("request failed", code=error.code(), detail=error.detail, path=instance)
    return response(problem, _headers(error))


def install(app: FastAPI) -> None:
    """Make `app` answer every error as a problem document."""

    @app.exception_handler(FoldserveError)
    async def _own(request: Request, error: FoldserveError) -> Response:
        return error_response(error, request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        wrong = [
            {"where": ".".join(str(part) for part in item["loc"]), "reason": item["msg"]}
            for item in error.errors()
        ]
        detail = "; ".join(f"{item['where']}: {item['reason']}" for item in wrong[:5])
        return _framework(422, _INVALID, detail, request.url.path, errors=wrong[:20])

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        phrase = HTTPStatus(error.status_code).phrase
        row = _FRAMEWORK.get(
            error.status_code,
            (phrase.lower().replace(" ", "_"), phrase, "Correct the request; see /docs."),
        )
        detail = f"{request.method} {request.url.path}: {error.detail}."
        return _framework(error.status_code, row, detail, request.url.path, headers=error.headers)


def internal_error(instance: str) -> Response:
    """The answer to an unexpected exception: its cause is in the log, under the request's id."""
    return _framework(500, _INTERNAL, "An unexpected error was logged.", instance)


def not_found(instance: str) -> Response:
    """The answer for an address where there is nothing."""
    return _framework(404, _FRAMEWORK[404], f"{instance} does not exist.", instance)


def malformed_request(detail: str) -> dict[str, Any]:
    """The problem of bytes that are no request."""
    return _framework_body(400, _MALFORMED, detail)


def too_many_connections(limit: int) -> dict[str, Any]:
    """The problem of one connection more than `limit`."""
    return _framework_body(503, _BUSY, f"{limit} connections are open.")


def catalogue() -> list[dict[str, Any]]:
    """Every code that a problem document may carry: `code`, `status`, `title`, `remedy`."""
    own = [
        {
            "code": kind.code(),
            "status": int(status_of(kind)),
            "title": kind.title,
            "remedy": kind.remedy,
        }
        for kind in errors.all_kinds()
    ]
    rows = [
        (400, _MALFORMED),
        (404, _FRAMEWORK[404]),
        (405, _FRAMEWORK[405]),
        (422, _INVALID),
        (500, _INTERNAL),
        (503, _BUSY),
    ]
    return own + [
        {"code": code, "status": status, "title": title, "remedy": remedy}
        for status, (code, title, remedy) in rows
    ]


def _framework(
    status: int,
    row: tuple[str, str, str],
    detail: str,
    instance: str,
    *,
    headers: Mapping[str, str] | None = None,
    **extra: Any,
) -> Response:
    return response(_framework_body(status, row, detail, instance=instance, **extra), headers)


def _framework_body(
    status: int, row: tuple[str, str, str], detail: str, **extra: Any
) -> dict[str, Any]:
    code, title, remedy = row
    head = {"type": f"/problems/{code}", "title": title, "status": status, "detail": detail}
    return {**head, "code": code, "remedy": remedy, **extra}


def _headers(error: FoldserveError) -> dict[str, str]:
    """`Retry-After` in whole seconds, where the error knows or a repetition is the remedy."""
    if isinstance(error, errors.Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="foldserve"'}
    wait = error.extra.get("retry_after")
    if wait is None and isinstance(error, errors.QueueFull | errors.NotLoaded):
        wait = 1
    return {} if wait is None else {"Retry-After": str(max(1, math.ceil(float(wait))))}
