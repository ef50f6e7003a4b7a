"""Models and versions as resources: lists, states, the default, deletion."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response

from service import errors
from service.api.documented import refusals
from service.api.resources import (
    model_path,
    model_resource,
    next_link,
    version_resource,
)
from service.api.schemas import (
    DefaultRequest,
    ModelAnswer,
    ModelWithVersions,
    PageAnswer,
    VersionAnswer,
)
from service.api.state import Here, Service, in_thread
from service.api.uploads import ModelName
from service.errors import BadInput

router = APIRouter(tags=["models"])

VersionNumber = Annotated[int, Path(ge=1, le=2**31 - 1, examples=[1])]
Limit = Annotated[int | None, Query(ge=1, description="Items of the page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="Where the page begins.")]
_MISSING = (errors.ModelNotFound, errors.VersionNotFound, errors.NameInvalid)


def page_size(service: Service, limit: int | None) -> int:
    """How many items a page has. Raises BadInput beyond the setting."""
    most = service.settings.max_page_size
    if limit is not None and limit > most:
        raise BadInput(f"`limit` is {limit}.", remedy=f"Ask for at most {most} items a page.")
    return limit or service.settings.page_size


@router.get(
    "/v1/models",
    summary="List the models",
    response_model=PageAnswer[ModelAnswer],
    responses=refusals(),
)
async def list_models(service: Here, limit: Limit = None, cursor: Cursor = None) -> dict[str, Any]:
    """All models by name, in pages."""
    size = page_size(service, limit)
    page = await in_thread(service.catalog.list_models, cursor, size)
    return {
        "items": [model_resource(model) for model in page.items],
        "next": next_link("/v1/models", page.next_cursor, size),
    }


@router.get(
    "/v1/models/{name}",
    summary="One model",
    response_model=ModelWithVersions,
    responses=refusals(*_MISSING),
)
async def get_model(name: ModelName, service: Here) -> dict[str, Any]:
    """One model and its newest versions."""
    model = await in_thread(service.catalog.get_model, name)
    return model_resource(model) | await _versions(service, name, None, None)


@router.get(
    "/v1/models/{name}/versions",
    summary="List a model's versions",
    response_model=PageAnswer[VersionAnswer],
    responses=refusals(*_MISSING),
)
async def list_versions(
    name: ModelName, service: Here, limit: Limit = None, cursor: Cursor = None
) -> dict[str, Any]:
    """A model's versions, the newest first, in pages."""
    found = await _versions(service, name, limit, cursor)
    return {"items": found["versions"], "next": found["next"]}


@router.get(
    "/v1/models/{name}/versions/{version}",
    summary="One version",
    response_model=VersionAnswer,
    responses=refusals(*_MISSING),
)
async def get_version(name: ModelName, version: VersionNumber, service: Here) -> dict[str, Any]:
    """A version's state, checkpoint, architecture, certificate summary, and error if any."""
    record = await in_thread(service.catalog.get_version, name, version)
    model = await in_thread(service.catalog.get_model, name)
    return version_resource(record, model.default_version)


@router.put(
    "/v1/models/{name}/default",
    summary="Choose the version that serves",
    response_model=ModelAnswer,
    responses=refusals(*_MISSING, errors.Conflict, errors.NotServable),
)
async def set_default(name: ModelName, choice: DefaultRequest, service: Here) -> dict[str, Any]:
    """Roll forward or back to a ready version, which is pinned: later versions leave it.

    The version is loaded and warm before it answers, and the one before answers until then. `null`
    takes the pin away: the newest ready version serves, and each later one from when it is ready.
    """
    if choice.version is not None:
        record = await in_thread(service.catalog.get_version, name, choice.version)
        if record.state.final and record.error is None:
            await service.host.ensure(name, choice.version)
    model = await in_thread(service.catalog.set_default, name, choice.version)
    await service.host.follow(name)
    return model_resource(model)


@router.delete(
    "/v1/models/{name}/versions/{version}",
    status_code=204,
    summary="Delete a version",
    responses=refusals(*_MISSING),
)
async def delete_version(name: ModelName, version: VersionNumber, service: Here) -> Response:
    """Forget a version; if it was the default, the newest ready one left takes its place."""
    await in_thread(service.catalog.delete_version, name, version)
    await service.host.follow(name)
    await service.host.forget(name, version)
    return Response(status_code=204)


@router.delete(
    "/v1/models/{name}",
    status_code=204,
    summary="Delete a model",
    responses=refusals(*_MISSING),
)
async def delete_model(name: ModelName, service: Here) -> Response:
    """Forget a model with all its versions. Its version numbers do not come back."""
    await in_thread(service.catalog.delete_model, name)
    await service.host.forget(name)
    return Response(status_code=204)


async def _versions(
    service: Service, name: str, limit: int | None, cursor: str | None
) -> dict[str, Any]:
    size = page_size(service, limit)
    model = await in_thread(service.catalog.get_model, name)
    page = await in_thread(service.catalog.list_versions, name, cursor, size)
    return {
        "versions": [version_resource(each, model.default_version) for each in page.items],
        "next": next_link(f"{model_path(name)}/versions", page.next_cursor, size),
    }
