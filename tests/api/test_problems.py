from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service import errors
from service.api import problems
from service.api.layers import Application
from service.api.metrics import Metrics
from service.api.middleware import AroundEveryRequest
from service.errors import FoldserveError, all_kinds
from tests.api.problem import problem

ROUTES = {
    "/v1/models": {"get"},
    "/v1/models/{name}": {"get", "delete"},
    "/v1/models/{name}/versions": {"get", "post"},
    "/v1/models/{name}/versions/{version}": {"get", "patch", "delete"},
    "/v1/models/{name}/versions/{version}/events": {"get"},
    "/v1/models/{name}/versions/{version}/report": {"get"},
    "/v1/models/{name}/versions/{version}/checkpoints/train": {"get"},
    "/v1/models/{name}/versions/{version}/checkpoints/deploy": {"get"},
    "/v1/models/{name}/predict": {"post"},
    "/v1/models/{name}/benchmark": {"get", "post"},
    "/v1/models/{name}/default": {"put"},
    "/health": {"get"},
    "/health/live": {"get"},
    "/health/ready": {"get"},
    "/metrics": {"get"},
    "/v2": {"get"},
    "/v2/health/live": {"get"},
    "/v2/health/ready": {"get"},
    "/v2/models/stats": {"get"},
    **{
        f"/v2/models/{{name}}{version}{what}": {"post" if what == "/infer" else "get"}
        for version in ("", "/versions/{version}")
        for what in ("", "/ready", "/config", "/stats", "/infer")
    },
    "/v2/repository/index": {"post"},
    "/v2/repository/models/{name}/load": {"post"},
    "/v2/repository/models/{name}/unload": {"post"},
}


@pytest.mark.parametrize("kind", list(all_kinds()))
def test_every_error_becomes_a_problem(kind: type[FoldserveError]) -> None:
    error = kind("what happened", keys=["a"], title="forged", status=1, type="forged")
    body = problems.document(error.to_dict() | {"title": kind.title}, "/here", version=3)
    assert body["type"] == f"/problems/{kind.code()}"
    assert body["status"] == problems.status_of(kind)
    assert 400 <= body["status"] < 600
    assert (body["detail"], body["instance"]) == ("what happened", "/here")
    assert (body["code"], body["keys"], body["version"]) == (kind.code(), ["a"], 3)


def test_the_statuses_of_the_design() -> None:
    assert problems.status_of(errors.QueueFull) == HTTPStatus.TOO_MANY_REQUESTS
    assert problems.status_of(errors.UploadTooLarge) == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    assert problems.status_of(errors.StorageFull) == HTTPStatus.INSUFFICIENT_STORAGE
    assert problems.status_of(errors.MixedForm) == HTTPStatus.UNPROCESSABLE_ENTITY
    assert problems.status_of(errors.CertificateFailed) == HTTPStatus.UNPROCESSABLE_ENTITY
    assert problems.status_of(errors.ModelNotFound) == HTTPStatus.NOT_FOUND


def test_framework_errors_are_problems_too(http: httpx.Client) -> None:
    problem(http.get("/nothing"), 404, "not_found")
    answer = http.delete("/health")
    problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]
    body = problem(http.get("/v1/models", params={"limit": "many"}), 422, "invalid_request")
    assert body["errors"][0]["where"] == "query.limit"


def test_request_ids_are_echoed_if_harmless(http: httpx.Client) -> None:
    header = "x-request-id"
    assert http.get("/health/live", headers={header: "abc-1"}).headers[header] == "abc-1"
    made = http.get("/health/live", headers={header: "a b\tc"}).headers[header]
    assert len(made) == 32
    assert made != http.get("/health/live").headers[header]


def test_security_headers_are_everywhere(http: httpx.Client) -> None:
    for path in ("/", "/health", "/nothing", "/v1/models", "/static/css/base.css"):
        headers = http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers


def broken() -> FastAPI:
    """An application with the real error handling and routes that fail."""
    app = Application()
    problems.install(app)
    app.add_middleware(AroundEveryRequest, metrics=Metrics(), access_log=False)

    @app.get("/secret")
    async def secret() -> None:
        raise RuntimeError("password=hunter2")

    @app.get("/busy")
    async def busy() -> None:
        raise errors.QueueFull("9 rows wait.", retry_after=1.2)

    return app


def ask(path: str) -> httpx.Response:
    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app=broken())
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(path)

    return asyncio.run(once())


def test_an_unexpected_error_tells_nothing_but_its_request_id() -> None:
    answer = ask("/secret")
    problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text
    assert "RuntimeError" not in answer.text
    assert len(answer.headers["x-request-id"]) == 32


def test_busy_says_when_to_come_back() -> None:
    answer = ask("/busy")
    problem(answer, 429, "queue_full")
    assert answer.headers["retry-after"] == "2"


def documented(openapi: dict[str, Any]) -> dict[str, set[str]]:
    return {path: set(methods) for path, methods in openapi["paths"].items()}


def test_openapi_holds_the_routes_of_the_design(http: httpx.Client) -> None:
    openapi = http.get("/openapi.json").json()
    assert documented(openapi) == ROUTES
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["description"], where
            assert any(code.startswith("2") for code in operation["responses"]), where
            for code, answer in operation["responses"].items():
                if code.startswith(("4", "5")) and "/health/ready" not in path:
                    # The protocol has an error object of its own.
                    kind = "json" if path.startswith("/v2") else "problem+json"
                    assert f"application/{kind}" in answer["content"], where


def test_openapi_has_examples(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for name in ("CheckpointAnswer", "ArchitectureAnswer", "FusionAnswer", "ClassScore"):
        assert any("examples" in field for field in schemas[name]["properties"].values()), name
