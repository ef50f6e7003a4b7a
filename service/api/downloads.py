"""What a version can be downloaded as: its report, the uploaded bytes, the deploy form."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from service import errors, pipeline
from service.api.documented import Responses, refusals
from service.api.models import VersionNumber
from service.api.state import Here, Service, in_thread
from service.api.uploads import ModelName
from service.errors import FormNotAvailable, VersionNotReady
from service.exports import FORMATS, exported_artifact
from service.hosting import worker_limits
from service.store import State, VersionRecord

router = APIRouter(tags=["downloads"])

_BINARY = "application/octet-stream"
_FILE: Responses = {
    200: {
        "description": "The file, with its SHA-256 as ETag.",
        "content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}},
    }
}
_REPORT: Responses = {
    200: {
        "description": "Every block: fused, kept or refused, with rules, shapes and errors.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}
_MISSING = refusals(
    errors.ModelNotFound,
    errors.VersionNotFound,
    errors.NameInvalid,
    errors.VersionNotReady,
    errors.FormNotAvailable,
    errors.BlobCorrupt,
)
_EXPORTS = refusals(
    errors.VersionNotReady,
    errors.ExportFailed,
    errors.FormatNotInstalled,
    errors.ConversionError,
    errors.ConversionInterrupted,
)


@router.get(
    "/v1/models/{name}/versions/{version}/report",
    summary="The whole fusion report",
    response_class=FileResponse,
    responses=_REPORT | _MISSING,
)
async def report(name: ModelName, version: VersionNumber, service: Here) -> Response:
    """Architecture with its evidence, certificate with its numbers, and every block."""
    record = await _ready(service, name, version)
    return await _blob(service, record.artifacts["report"], "application/json", None)


@router.get(
    "/v1/models/{name}/versions/{version}/checkpoints/train",
    summary="The uploaded file",
    response_class=FileResponse,
    responses=_FILE | _MISSING,
)
async def uploaded(name: ModelName, version: VersionNumber, service: Here) -> Response:
    """The uploaded bytes, unchanged; those of a rejected version too."""
    record = await in_thread(service.catalog.get_version, name, version)
    filename = record.checkpoint.filename or f"{name}-{version}-train.pth"
    return await _blob(service, record.checkpoint.sha256, _BINARY, filename)


@router.get(
    "/v1/models/{name}/versions/{version}/checkpoints/deploy",
    summary="The deploy form",
    response_class=FileResponse,
    responses=_FILE | _MISSING | _EXPORTS,
)
async def deploy(
    name: ModelName,
    version: VersionNumber,
    service: Here,
    format: Annotated[  # the parameter's public name
        Literal["safetensors", "pth", "bundle", "onnx", "openvino"],
        Query(
            description="State dict (`safetensors`, `pth`), program (`bundle`), or the network for "
            "another engine: `onnx`, or `openvino` (a zip of `deploy.xml` and `deploy.bin`)."
        ),
    ] = "safetensors",
) -> Response:
    """The fused network: for known dialects under the official deploy keys.

    `onnx` and `openvino` are made when they are first asked for, which takes seconds to minutes,
    and kept. They have the batch as their leading axis, and were run in their own engine on the
    certificate's probes before they are handed out.
    """
    record = await _ready(service, name, version)
    stem = f"{name}-{version}-deploy"
    if format == "safetensors":
        sha256 = _artifact(record, "deploy_checkpoint")
        return await _blob(service, sha256, _BINARY, f"{stem}.safetensors")
    if format == "bundle":
        sha256 = _artifact(record, "deploy_program")
        return await _blob(service, sha256, _BINARY, f"{stem}.bundle.safetensors")
    if format == "pth":
        return await _as_torch(service, _artifact(record, "deploy_checkpoint"), f"{stem}.pth")
    sha256 = await _exported(service, record, format)
    return await _blob(service, sha256, _BINARY, f"{stem}.{FORMATS[format].ending}")


async def _exported(service: Service, record: VersionRecord, format: str) -> str:
    """The sha256 of an export, made by whoever asks first; one is made at a time."""
    found = record.artifacts.get(FORMATS[format].artifact)
    if found is not None:
        return found
    async with service.exporting:
        return await in_thread(
            exported_artifact,
            service.catalog,
            service.blobs,
            record.model,
            record.version,
            format,
            service.settings.scratch_dir / "exports",
            worker_limits(service.settings).child,
            service.stopping,
        )


async def _ready(service: Service, name: str, version: int) -> VersionRecord:
    record = await in_thread(service.catalog.get_version, name, version)
    if record.state != State.READY:
        raise VersionNotReady(
            f"Version {version} of {name!r} is {record.state.value}.", state=record.state.value
        )
    return record


def _artifact(record: VersionRecord, kind: str) -> str:
    if kind not in record.artifacts:
        raise FormNotAvailable(f"Version {record.version} has no {kind.replace('_', ' ')}.")
    return record.artifacts[kind]


async def _blob(service: Service, sha256: str, kind: str, filename: str | None) -> Response:
    """A stored blob as a file, checked against its hash before the first byte leaves."""
    path = await in_thread(service.blobs.open_path, sha256)
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {"ETag": f'"{sha256}"', "Repr-Digest": f"sha-256=:{digest}:"}
    return FileResponse(path, media_type=kind, filename=filename, headers=headers)


async def _as_torch(service: Service, sha256: str, filename: str) -> Response:
    """The state dict rewritten by torch.save into a file that goes when it was sent."""
    source = await in_thread(service.blobs.open_path, sha256)
    folder = service.settings.scratch_dir / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".pth", delete=False) as file:
        target = Path(file.name)
    try:
        await in_thread(pipeline.save_as_torch, source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return FileResponse(
        target,
        media_type=_BINARY,
        filename=filename,
        background=BackgroundTask(target.unlink, missing_ok=True),
    )
