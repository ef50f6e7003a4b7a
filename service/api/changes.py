"""Changing what a version's answers look like: its labels, and how images become its input."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service import errors
from service.api import images
from service.api.bodies import media_type, whole
from service.api.documented import refusals
from service.api.models import VersionNumber
from service.api.resources import version_resource
from service.api.schemas import VersionAnswer
from service.api.state import Here, in_thread
from service.api.uploads import ModelName
from service.errors import BadInput, InvalidConfig, UnsupportedMediaType
from service.hosting import check_changes
from service.store import VersionRecord

router = APIRouter(tags=["versions"])

_TYPES = ("application/merge-patch+json", "application/json")
_NUMBERS = {"type": "array", "items": {"type": "number"}}
_SCHEMA = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": False,
    "properties": {
        "labels": {"type": ["array", "null"], "items": {"type": "string"}},
        "preprocessing": {
            "oneOf": [
                {"type": "null"},
                {"type": "string", "description": "The name of a preset."},
                {
                    "type": "object",
                    "properties": {
                        "preset": {"type": ["string", "null"]},
                        "resize": {"type": ["integer", "null"], "minimum": 1},
                        "crop": {"enum": ["center", "none"]},
                        "interpolation": {"enum": ["nearest", "bilinear", "bicubic", "lanczos"]},
                        "mean": _NUMBERS,
                        "std": _NUMBERS,
                        "channel_order": {"enum": ["rgb", "bgr"]},
                    },
                },
            ]
        },
    },
    "example": {"labels": ["cat", "dog"], "preprocessing": "cifar10"},
}


@router.patch(
    "/v1/models/{name}/versions/{version}",
    summary="Change a version's labels or preprocessing",
    response_model=VersionAnswer,
    responses=refusals(
        errors.ModelNotFound,
        errors.VersionNotFound,
        errors.NameInvalid,
        errors.InvalidConfig,
        errors.UnsupportedMediaType,
        errors.UploadTooLarge,
        errors.RequestStalled,
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": _SCHEMA} for kind in _TYPES},
        }
    },
)
async def change(
    name: ModelName, version: VersionNumber, request: Request, service: Here
) -> dict[str, Any]:
    """Replace `labels`, `preprocessing`, or both; null takes a field back, others stay.

    The next prediction has it, without loading anything. Everything else in a config is settled
    by the conversion.
    """
    if media_type(request) not in ("", *_TYPES):
        raise UnsupportedMediaType(
            f"A change has the type {media_type(request)!r} here.",
            remedy=f"Send {' or '.join(_TYPES)}.",
        )
    settings = service.settings
    limit, setting = settings.max_config_bytes, "FOLDSERVE_MAX_CONFIG_BYTES"
    body = bytes(await whole(request, limit, settings.body_idle_seconds, setting))
    changes = check_changes(body)
    record = await in_thread(service.catalog.get_version, name, version)
    _check_fit(record, changes)
    record = await in_thread(service.catalog.set_config, name, version, changes)
    service.host.describe_anew(record)
    model = await in_thread(service.catalog.get_model, name)
    return version_resource(record, model.default_version)


def _check_fit(record: VersionRecord, changes: dict[str, Any]) -> None:
    """Raise InvalidConfig where a change contradicts what is known of the network."""
    known = record.architecture or {}
    labels, classes = changes.get("labels"), known.get("num_classes")
    if labels and classes and len(labels) != classes:
        raise InvalidConfig(
            f"`labels` holds {len(labels)} names; the network has {classes} classes.",
            field="labels",
        )
    if changes.get("preprocessing") and known.get("input_shape"):
        try:
            images.recipe(known["input_shape"], changes["preprocessing"])
        except BadInput as error:
            raise InvalidConfig(error.detail, field="preprocessing") from None
