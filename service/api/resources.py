"""Catalog records as the resources that the routes answer."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from service.api import images, problems
from service.errors import BadInput
from service.store import ModelRecord, VersionRecord


def model_path(model: str) -> str:
    """The address of a model."""
    return f"/v1/models/{model}"


def version_path(model: str, version: int) -> str:
    """The address of a version."""
    return f"/v1/models/{model}/versions/{version}"


def version_resource(record: VersionRecord, default_version: int | None) -> dict[str, Any]:
    """The JSON of one version."""
    path = version_path(record.model, record.version)
    return {
        "model": record.model,
        "version": record.version,
        "state": record.state.value,
        "default": record.version == default_version,
        "checkpoint": {
            "sha256": record.checkpoint.sha256,
            "bytes": record.checkpoint.bytes,
            "form": record.checkpoint.form,
            "filename": record.checkpoint.filename,
        },
        "config": record.config,
        "architecture": record.architecture,
        "preprocessing": _preprocessing(record),
        "fusion": record.fusion,
        "execution": (record.fusion or {}).get("execution"),
        "progress": None if record.state.final else record.progress,
        "error": None if record.error is None else problems.document(record.error, path),
        "created_at": record.created_at,
        "updated_at": record.updated_at,
        "links": {
            "self": path,
            "model": model_path(record.model),
            "events": f"{path}/events",
            "report": f"{path}/report",
            "train": f"{path}/checkpoints/train",
            "deploy": f"{path}/checkpoints/deploy",
            "predict": f"{model_path(record.model)}/predict?version={record.version}",
        },
    }


def model_resource(record: ModelRecord) -> dict[str, Any]:
    """The JSON of one model, without its versions."""
    path = model_path(record.name)
    return {
        "name": record.name,
        "default_version": record.default_version,
        "pinned": record.pinned,
        "created_at": record.created_at,
        "links": {
            "self": path,
            "versions": f"{path}/versions",
            "predict": f"{path}/predict",
            "benchmark": f"{path}/benchmark",
        },
    }


def next_link(path: str, cursor: str | None, limit: int) -> str | None:
    """The address of the page after `cursor`, or None at the end."""
    return None if cursor is None else f"{path}?{urlencode({'limit': limit, 'cursor': cursor})}"


def _preprocessing(record: VersionRecord) -> dict[str, Any] | None:
    if record.architecture is None or not record.servable:
        return None
    try:
        how = images.recipe(record.architecture["input_shape"], record.config.get("preprocessing"))
    except BadInput as error:
        return {"error": error.detail}
    return None if how is None else how.to_dict()
