"""The pages for people: status at `/`, the API at `/docs`, the problem codes at `/problems`.

Rendered on the server, without scripts, from files that ship in the package: nothing is loaded from
elsewhere, so they work on a machine without a way out and under the strictest content policy.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

import service.web
from service import __version__
from service.api import health, problems
from service.api.resources import version_resource
from service.api.state import Here, Service, in_thread
from service.errors import FoldserveError
from service.store import VersionRecord

router = APIRouter(include_in_schema=False)

_WEB = Path(service.web.__file__).parent
_RECENT = 20
_METHODS = ("get", "post", "put", "delete")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


def _small(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"


def _figure(value: float) -> str:
    """A number short enough for a label: 1520000000 is `1.52 G`, 31.24 is `31.2`."""
    for size, sign in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= size:
            return f"{value / (1e3 if sign == ' k' else size):.3g}{sign}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


_templates = Environment(
    loader=PackageLoader("service.web"), autoescape=True, undefined=StrictUndefined
)
_templates.filters |= {"duration": _duration, "small": _small, "figure": _figure}


def mount_static(app: FastAPI) -> None:
    """Serve the style and the icon."""
    app.mount("/static", StaticFiles(directory=_WEB / "static"), name="static")


def page(name: str, **values: Any) -> Response:
    """One of the templates, filled in; never kept by a cache."""
    text = _templates.get_template(f"{name}.html").render(page=name, version=__version__, **values)
    return HTMLResponse(text, headers={"Cache-Control": "no-store"})


@router.get("/")
async def status(request: Request, service: Here) -> Response:
    """What is served, what was uploaded last, and how the service is."""
    body = await health.overview(service)
    served, recent = await in_thread(_status_rows, service, body["models"])
    base = str(request.base_url).rstrip("/")
    return await in_thread(page, "status", health=body, served=served, recent=recent, base=base)


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


def _status_rows(
    service: Service, models: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    served = []
    for each in models:
        try:
            record = service.catalog.get_version(each["model"], each["version"])
        except FoldserveError:  # deleted meanwhile
            continue
        if record.fusion is not None and record.architecture is not None:
            served.append(_card(each, record))
    page = service.catalog.list_versions(limit=_RECENT)
    recent = [version_resource(record, service.host.default(record.model)) for record in page.items]
    return served, recent


def _card(health_row: dict[str, Any], record: VersionRecord) -> dict[str, Any]:
    form = health_row["forms"].get("deploy") or next(iter(health_row["forms"].values()))
    return {
        "model": record.model,
        "version": record.version,
        "default": health_row["default"],
        "architecture": record.architecture,
        "fusion": record.fusion,
        "saving": health_row["latency_saving"],
        "measure": health_row["measure"],
        "runs": f"{form['device']}, {form['backend']}, {form['precision']}",
    }


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
