"""The pages for people: models at `/`, a model, the service, the API and the problem codes.

Pages of data are shells without data: their scripts read the same JSON as every other client, with
the login's cookie where keys are needed, so a page can show nothing that its reader may not ask
for. All files ship in the package and load nothing from elsewhere: they work on a machine without a
way out and under a strict content policy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import service.web
from service import __version__
from service.api import problems
from service.api.guard import COOKIE
from service.store import check_model_name

router = APIRouter(include_in_schema=False)

_WEB = Path(service.web.__file__).parent
_METHODS = ("get", "post", "put", "patch", "delete")
_templates = Environment(
    loader=PackageLoader("service.web"), autoescape=True, undefined=StrictUndefined
)


class _Files(StaticFiles):
    """Files that the browser keeps but asks about, so that an upgrade is seen at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def mount_static(app: FastAPI) -> None:
    """Serve styles, scripts and the icon, compressed."""
    app.mount("/static", GZipMiddleware(_Files(directory=_WEB / "static")), name="static")


def page(template: str, /, **values: Any) -> Response:
    """One of the templates, filled in; never kept by a cache."""
    text = _templates.get_template(f"{template}.html").render(
        {"page": template, "version": __version__, "keyed": False, **values}
    )
    return HTMLResponse(text, headers={"Cache-Control": "no-store"})


@router.get("/")
async def home(request: Request) -> Response:
    """Upload a checkpoint, follow it, and the list of models."""
    return page("home", keyed=COOKIE in request.cookies)


@router.get("/models/{name}")
async def model(name: str, request: Request) -> Response:
    """A model: versions, certificate, network, latency, downloads. Raises NameInvalid."""
    return page("model", name=check_model_name(name), keyed=COOKIE in request.cookies)


@router.get("/service")
async def service_page(request: Request) -> Response:
    """Throughput, queues, latency, device and memory, live."""
    return page("service", keyed=COOKIE in request.cookies)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The OpenAPI document for people."""
    base = str(request.base_url).rstrip("/")
    return page("docs", groups=_operations(request.app.openapi(), base))


@router.get("/problems")
async def all_problems() -> Response:
    """Every problem code."""
    return page("problems", rows=problems.catalogue(), chosen=None)


@router.get("/problems/{code}")
async def one_problem(code: str) -> Response:
    """What a problem document's `type` points to."""
    rows = problems.catalogue()
    if code not in {row["code"] for row in rows}:
        return problems.not_found(f"/problems/{code}")
    return page("problems", rows=rows, chosen=code)


def _operations(openapi: dict[str, Any], base: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The document's operations by tag, in order of appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, methods in openapi["paths"].items():
        for method in _METHODS:
            if (operation := methods.get(method)) is not None:
                row = _operation(path, method, operation, base)
                groups.setdefault(operation.get("tags", ["other"])[0], []).append(row)
    return list(groups.items())


def _operation(path: str, method: str, operation: dict[str, Any], base: str) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    examples = [
        body["schema"]["example"]
        for body in content.values()
        if "example" in body.get("schema", {})
    ]
    return {
        "path": path,
        "method": method,
        "summary": operation.get("summary", ""),
        "description": operation.get("description", ""),
        "parameters": operation.get("parameters", []),
        "bodies": list(content),
        "responses": [(code, r["description"]) for code, r in operation["responses"].items()],
        "example": json.dumps(examples[0]) if examples else None,
        "curl": _curl(path, method, list(content), base),
    }


def _curl(path: str, method: str, kinds: list[str], base: str) -> str:
    url = base + path.replace("{name}", "repvgg-a0").replace("{version}", "1")
    if path.endswith("/predict"):
        return f"curl -H 'Content-Type: image/jpeg' --data-binary @cat.jpg {url}"
    if method == "post" and "multipart/form-data" in kinds:
        return f"curl -H 'Prefer: wait=120' -F checkpoint=@RepVGG-A0-train.pth {url}"
    if path.endswith("/default"):
        return f"curl -X PUT -H 'Content-Type: application/json' -d '{{\"version\": 1}}' {url}"
    return f"curl {url}" if method == "get" else f"curl -X {method.upper()} {url}"
