"""The protocol's REST routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import orjson
from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from service import errors
from service.api import bodies, compression, problems
from service.api.direct import DirectRoute, direct
from service.api.documented import Responses
from service.api.encoding import json_bytes
from service.api.inference import find_hosted, unless_departed
from service.api.known import Headers, KnownResponse
from service.api.state import Here, Service, of
from service.api.v2 import models, repository, rest
from service.api.v2.documented import (
    INFER_BODY,
    INFER_RESPONSE,
    IndexEntry,
    InferAnswerModel,
    LiveAnswer,
    ModelMetadataAnswer,
    ModelReadyAnswer,
    ReadyAnswer,
    ServerMetadataAnswer,
    StatisticsAnswer,
    refusals,
)
from service.api.v2.infer import infer
from service.api.v2.messages import checked_version
from service.errors import BadInput
from service.hosting import Hosted

T = TypeVar("T")
router = APIRouter(prefix="/v2", tags=["open inference protocol"])
hot = APIRouter(route_class=DirectRoute)

Name = Annotated[str, Path(description="The model.", examples=["repvgg-a0"])]
Version = Annotated[int, Path(ge=1, le=2**31 - 1, description="Its version.", examples=[1])]

_JSON: Final = "application/json"
_BINARY: Final = "application/octet-stream"
_AWAY_FROM_LOOP: Final = 1 << 16  # JSON and compressed bodies beyond this are read on a thread
_READING: Final = (errors.BadInput, errors.UploadTooLarge, errors.RequestStalled)
_MISSING: Final = (
    errors.ModelNotFound,
    errors.VersionNotFound,
    errors.NameInvalid,
    errors.VersionNotReady,
    errors.ModelUnloaded,
    errors.NotServable,
    errors.NotLoaded,
)


# ---- the server -------------------------------------------------------------------------------


@router.get("", summary="Server metadata", response_model=ServerMetadataAnswer)
async def server_metadata() -> dict[str, Any]:
    """Name, version and the protocol's extensions that are offered."""
    return models.server_metadata()


@router.get("/health/live", summary="Is the server live?", response_model=LiveAnswer)
async def live() -> dict[str, bool]:
    """200 as long as the event loop turns."""
    return {"live": True}


@router.get(
    "/health/ready",
    summary="Is the server ready?",
    response_model=ReadyAnswer,
    responses={400: {"description": "Still loading, or draining.", "model": ReadyAnswer}},
)
async def ready(service: Here) -> Response:
    """200 once every model's default is loaded or known to fail, and until the drain begins."""
    is_ready = await models.server_ready(service)
    return _json({"ready": is_ready}, 200 if is_ready else 400)


@router.get(
    "/models/stats",
    summary="Statistics of every loaded version",
    response_model=StatisticsAnswer,
)
async def all_statistics(service: Here) -> dict[str, Any]:
    """Counts since each version was loaded."""
    return await models.statistics(service, None, None)


# ---- a model, with and without a version ------------------------------------------------------


_FOUND: Final = refusals(*_MISSING)
_READY: Final[Responses] = {
    200: {"description": "Loaded; it answers at once.", "model": ModelReadyAnswer},
    400: {"description": "Not loaded.", "model": ModelReadyAnswer},
}


@router.get("/models/{name}/ready", summary="Is a model ready?", responses=_READY)
async def model_ready(name: Name, service: Here) -> Response:
    """200 when the default version is loaded and answers at once, else 400."""
    return _model_ready(service, name, None)


@router.get(
    "/models/{name}/versions/{version}/ready", summary="Is a version ready?", responses=_READY
)
async def version_ready(name: Name, version: Version, service: Here) -> Response:
    """200 when the version is loaded and answers at once, else 400."""
    return _model_ready(service, name, version)


@router.get(
    "/models/{name}",
    summary="Model metadata",
    response_model=ModelMetadataAnswer,
    responses=_FOUND,
)
async def model_metadata(name: Name, service: Here) -> dict[str, Any]:
    """Versions that can serve, and the default's inputs and outputs; -1 is any number of rows."""
    return await models.model_metadata(service, name, None)


@router.get(
    "/models/{name}/versions/{version}",
    summary="Version metadata",
    response_model=ModelMetadataAnswer,
    responses=_FOUND,
)
async def version_metadata(name: Name, version: Version, service: Here) -> dict[str, Any]:
    """The same of one version, which is loaded if need be."""
    return await models.model_metadata(service, name, version)


@router.get("/models/{name}/config", summary="Model configuration", responses=_FOUND)
async def model_configuration(name: Name, service: Here) -> dict[str, Any]:
    """What measuring tools read: types, sizes of one row, the largest batch."""
    return await models.model_configuration(service, name, None)


@router.get(
    "/models/{name}/versions/{version}/config", summary="Version configuration", responses=_FOUND
)
async def version_configuration(name: Name, version: Version, service: Here) -> dict[str, Any]:
    """The same of one version."""
    return await models.model_configuration(service, name, version)


@router.get(
    "/models/{name}/stats",
    summary="Statistics of a model",
    response_model=StatisticsAnswer,
    responses=_FOUND,
)
async def model_statistics(name: Name, service: Here) -> dict[str, Any]:
    """Counts of every loaded version since it was loaded."""
    return await models.statistics(service, name, None)


@router.get(
    "/models/{name}/versions/{version}/stats",
    summary="Statistics of a version",
    response_model=StatisticsAnswer,
    responses=_FOUND,
)
async def version_statistics(name: Name, version: Version, service: Here) -> dict[str, Any]:
    """The same of one version."""
    return await models.statistics(service, name, version)


# ---- inference --------------------------------------------------------------------------------


async def serve(request: Request) -> Response:
    """Read, check, run, answer; see `documented` for what it takes."""
    service = of(request)
    version = checked_version(request.path_params.get("version"))
    on = await find_hosted(service, request.path_params["name"], version)
    if (full := on.full("deploy")) is not None:
        return problems.error_response(full, request.scope["path"])
    body = await _body(request, service, on)
    head = rest.head_length(request.headers.get(rest.HEADER_LENGTH), len(body))
    if head > service.settings.max_json_bytes:
        raise bodies.too_large(service.settings.max_json_bytes, "FOLDSERVE_MAX_JSON_BYTES")
    if head > _AWAY_FROM_LOOP:
        with on.expecting("deploy", 1):
            asked = await _on_thread(service, rest.parse, body, head)
    else:
        asked = rest.parse(body, head)
    answer = await unless_departed(request, infer(service, on, version, asked))
    pieces, json_length = rest.encode(answer)
    headers: Headers = ()
    if json_length is not None:
        headers += ((rest.HEADER_LENGTH, str(json_length)),)
    content = b"".join(pieces) if len(pieces) > 1 else bytes(pieces[0])
    coding = compression.accepted_coding(request.headers.get("accept-encoding"))
    if coding is not None:
        headers += (("Content-Encoding", coding),)
        content = await _on_thread(service, compression.compress, pieces, coding)
    kind = _JSON if json_length is None else _BINARY
    return KnownResponse(content, kind, headers)


@hot.post(
    "/models/{name}/infer",
    summary="Infer",
    response_model=InferAnswerModel,
    responses=INFER_RESPONSE,
    openapi_extra=INFER_BODY,
)
@direct(serve)
async def documented(name: Name) -> None:
    """Run the model's default version.

    The body is the protocol's JSON; tensors may follow it in binary, as the binary tensor data
    extension says. Floating-point inputs are taken as FP32, FP16, BF16 or FP64 and computed as
    FP32; other inputs in their own datatype alone. `Content-Encoding` may be gzip or deflate, and
    the answer is compressed when `Accept-Encoding` names one of them alone. Of the request's
    `parameters`, `form` ("deploy" or "train") chooses the network, `timing` (true) adds
    `queue_ms`, `compute_ms` and `batch_rows` to the answer's, and unknown ones come back.
    """


@hot.post(
    "/models/{name}/versions/{version}/infer",
    summary="Infer with a version",
    response_model=InferAnswerModel,
    responses=INFER_RESPONSE,
    openapi_extra=INFER_BODY,
)
@direct(serve)
async def documented_version(name: Name, version: Version) -> None:
    """Run one version, which is loaded if need be."""


async def _body(request: Request, service: Service, on: Hosted) -> bytearray | bytes | memoryview:
    """The request's body, expanded if it came compressed."""
    settings = service.settings
    coding = compression.content_coding(request.headers.get("content-encoding"))
    limit, name = settings.max_body_bytes, "FOLDSERVE_MAX_BODY_BYTES"
    body = await bodies.whole_or_view(request, limit, settings.body_idle_seconds, name)
    if coding is None:
        return body
    try:
        with on.expecting("deploy", 1):
            return await _on_thread(service, compression.expand, body, coding, limit)
    except compression.TooMuch:
        raise bodies.too_large(limit, name) from None


async def _on_thread(service: Service, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(service.decoders, function, *arguments)


router.include_router(hot)


# ---- the repository ---------------------------------------------------------------------------


@router.post(
    "/repository/index",
    summary="Every version and its state",
    response_model=list[IndexEntry],
    responses=refusals(*_READING),
    openapi_extra={"requestBody": {"content": {_JSON: {"schema": {"type": "object"}}}}},
)
async def index(request: Request, service: Here) -> list[dict[str, str]]:
    """Name, version, state (READY, LOADING, UNAVAILABLE) and reason; `{"ready": true}` filters."""
    asked = await _object(request, service)
    return await repository.index(service, ready_only=asked.get("ready") is True)


@router.post(
    "/repository/models/{name}/load",
    summary="Serve a model again",
    responses=refusals(*_MISSING, *_READING),
    openapi_extra={"requestBody": {"content": {_JSON: {"schema": {"type": "object"}}}}},
)
async def load(name: Name, request: Request, service: Here) -> Response:
    """Load the model's default version; it is warm when this answers."""
    await repository.load(service, name, await _object_parameters(request, service))
    return _json({}, 200)


@router.post(
    "/repository/models/{name}/unload",
    summary="Take a model out of serving",
    responses=refusals(errors.ModelNotFound, errors.NameInvalid, *_READING),
    openapi_extra={"requestBody": {"content": {_JSON: {"schema": {"type": "object"}}}}},
)
async def unload(name: Name, request: Request, service: Here) -> Response:
    """Unload every version of the model until it is loaded again or the service restarts."""
    await _object_parameters(request, service)
    await repository.unload(service, name)
    return _json({}, 200)


async def _object(request: Request, service: Service) -> dict[str, Any]:
    """A small JSON object as the body; nothing is an empty one. Raises BadInput."""
    settings = service.settings
    limit, name = settings.max_config_bytes, "FOLDSERVE_MAX_CONFIG_BYTES"
    body = await bodies.whole(request, limit, settings.body_idle_seconds, name)
    try:
        value = orjson.loads(body) if body else {}
    except orjson.JSONDecodeError as error:
        raise BadInput(f"The body is not JSON: {error}.", remedy="Send an object.") from None
    if not isinstance(value, dict):
        raise BadInput("The body is no JSON object.", remedy="Send an object, or nothing.")
    return value


async def _object_parameters(request: Request, service: Service) -> dict[str, Any]:
    value = (await _object(request, service)).get("parameters")
    if value is not None and not isinstance(value, dict):
        raise BadInput("`parameters` is no JSON object.", remedy="Send an object, or nothing.")
    return value or {}


def _model_ready(service: Service, name: str, version: int | None) -> Response:
    is_ready = models.model_ready(service, name, version)
    return _json({"name": name, "ready": is_ready}, 200 if is_ready else 400)


def _json(value: Any, status: int) -> Response:
    return Response(json_bytes(value), status, media_type=_JSON)
