from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response

from service.api import predict
from service.api.app import create_app
from service.api.direct import DirectDispatch, DirectRoute, direct
from service.api.guard import Guard
from service.api.middleware import AroundEveryRequest
from service.api.v2 import routes as v2
from service.errors import BadInput
from service.settings import Settings


async def echo(request: Request) -> Response:
    if request.path_params["name"] == "bad":
        raise BadInput("no")
    return Response(json.dumps(request.path_params))


router = APIRouter(route_class=DirectRoute)


@router.post("/models/{name}/versions/{version}/run")
@direct(echo)
async def documented(name: str, version: int) -> None:
    """Nothing."""


def answered(path: str, method: str = "POST", **more: Any) -> tuple[int, bytes]:
    """Status and body; 299 is what lies behind the dispatch."""
    sent: list[Any] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await Response(status_code=299)(scope, receive, send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
    asyncio.run(DirectDispatch(behind, [("/pre", router)])(scope | more, receive, send))
    return sent[0]["status"], sent[1]["body"]


def test_a_direct_route_is_answered_before_anything_behind() -> None:
    status, body = answered("/pre/models/a.b/versions/3/run")
    assert status == 200
    assert json.loads(body) == {"name": "a.b", "version": "3"}


def test_everything_else_is_passed_on() -> None:
    path = "/pre/models/a/versions/3/run"
    assert answered(path, "GET")[0] == 299
    assert answered(path, root_path="/behind")[0] == 299
    assert answered(path + "/")[0] == 299
    assert answered("/models/a/versions/3/run")[0] == 299
    assert answered("/pre/models/a/b/versions/3/run")[0] == 299
    assert answered(f"/pre/models/{'a' * 300}/versions/3/run")[0] == 299


def test_an_error_of_the_service_becomes_its_problem_document() -> None:
    status, body = answered("/pre/models/bad/versions/3/run")
    assert status == 422
    assert json.loads(body)["code"] == "bad_input"


def test_the_dispatch_is_the_innermost_and_knows_every_direct_route(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))
    innermost = app.user_middleware[-1]
    assert innermost.cls is DirectDispatch
    given = innermost.kwargs["routers"]
    known = {prefix + route.path for prefix, one in given for route in one.routes}
    direct_paths = {path for path, _ in _direct_operations(app.openapi())}
    assert known == direct_paths
    assert len(known) == len(predict.router.routes) + len(v2.hot.routes)


def test_the_middleware_stands_around_the_layers_of_fastapi(tmp_path: Path) -> None:
    app = create_app(Settings(data_dir=tmp_path))
    around = app.build_middleware_stack()
    assert isinstance(around, AroundEveryRequest)
    guard = around._app
    assert isinstance(guard, Guard)
    dispatch = guard._app
    assert isinstance(dispatch, DirectDispatch)
    assert isinstance(dispatch._app, ExceptionMiddleware)
    assert len(app.user_middleware) == 3  # they are still listed where FastAPI lists them


def _direct_operations(openapi: Any) -> list[tuple[str, Any]]:
    return [
        (path, operations["post"])
        for path, operations in openapi["paths"].items()
        if path.endswith(("/predict", "/infer"))
    ]
