"""Receiving checkpoints: streamed to the blob store while they are hashed, then queued."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service import errors
from service.api import problems
from service.api.bodies import MultipartReader, Part, chunks, declared_length, media_type
from service.api.documented import refusals
from service.api.encoding import json_bytes
from service.api.resources import version_path, version_resource
from service.api.schemas import VersionAnswer
from service.api.state import Here, Service, in_thread
from service.errors import BadInput, InvalidConfig, UnsupportedMediaType, UploadTooLarge
from service.hosting import CALIBRATION, check_calibration, check_config
from service.store import BlobRef, BlobWriter, State, VersionRecord, check_model_name

router = APIRouter(tags=["versions"])

_WRITE_BYTES = 1 << 20
_MULTIPART_OVERHEAD = 1 << 20
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\"?", re.IGNORECASE)

ModelName = Annotated[str, Path(description="`[a-z0-9][a-z0-9._-]{0,62}`", examples=["repvgg-a0"])]


class _Upload:
    """What arrived: the stored bytes, their name, the config's text, and calibration inputs."""

    def __init__(self) -> None:
        self.blob: BlobRef | None = None
        self.filename: str | None = None
        self.config = b""
        self.calibration: BlobRef | None = None


@router.post(
    "/v1/models/{name}/versions",
    status_code=202,
    summary="Upload a checkpoint",
    response_model=VersionAnswer,
    responses=refusals(
        errors.UploadTooLarge,
        errors.UnsupportedMediaType,
        errors.RequestStalled,
        errors.NameInvalid,
        errors.InvalidConfig,
        errors.BadInput,
        errors.StorageFull,
        errors.CheckpointError,
        errors.RecognitionError,
        also={
            201: {
                "description": "Converted and serving (with `Prefer: wait`).",
                "model": VersionAnswer,
            }
        },
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["checkpoint"],
                        "properties": {
                            "checkpoint": {"type": "string", "format": "binary"},
                            "config": {
                                "type": "string",
                                "description": "JSON: `architecture`, `input_shape`, "
                                "`preprocessing`, `labels`, `weights`, `backend`, `precision`.",
                                "example": '{"labels": ["cat", "dog"]}',
                            },
                            "calibration": {
                                "type": "string",
                                "format": "binary",
                                "description": "Typical inputs, one npy array [N, *input shape]: "
                                "they set the ranges of int8 and certify lower precisions.",
                            },
                        },
                    }
                },
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
)
async def upload(
    name: ModelName,
    request: Request,
    service: Here,
    config: Annotated[
        str | None, Query(description="The config JSON of a raw body.", examples=["{}"])
    ] = None,
    filename: Annotated[
        str | None, Query(description="The file's name, for a raw body; only shown.")
    ] = None,
    prefer: Annotated[
        str | None,
        Header(description="`wait=60` waits up to 60 s for the conversion.", examples=["wait=60"]),
    ] = None,
) -> Response:
    """Store a training checkpoint as the model's next version and queue its conversion.

    Answers 202 with the version's address. With `Prefer: wait=N` it answers 201 once the version
    is ready, the version's own problem if it is rejected, and 202 when the time is up.
    """
    check_model_name(name)
    received = await _receive(request, service, config, filename)
    checked = check_config(received.config)
    check_calibration(checked, received.calibration is not None)
    assert received.blob is not None
    service.metrics.uploaded_bytes.inc(received.blob.size)
    record = await in_thread(
        service.catalog.create_version,
        name,
        received.blob.sha256,
        received.blob.size,
        received.filename,
        checked,
        {} if received.calibration is None else {CALIBRATION: received.calibration.sha256},
        present=service.blobs.exists,
    )
    service.worker.wake()
    seconds = _wait_seconds(prefer, service)
    if seconds is not None:
        record = await _final(service, record, seconds)
    return await _answer(request, service, record, seconds)


async def _receive(
    request: Request, service: Service, config: str | None, filename: str | None
) -> _Upload:
    limit = service.settings.max_upload_bytes
    kind = media_type(request)
    multipart = kind == "multipart/form-data"
    if kind not in ("", "application/octet-stream") and not multipart:
        raise UnsupportedMediaType(
            f"An upload has the type {kind!r} here.",
            remedy="Send multipart/form-data with a `checkpoint` file (curl -F checkpoint=@FILE), "
            "or the bytes alone as application/octet-stream.",
        )
    length = declared_length(request)
    if length is not None and length > limit + (_MULTIPART_OVERHEAD if multipart else 0):
        raise _too_large(limit)
    if multipart:
        if config is not None:
            raise InvalidConfig("A multipart upload carries `config` as a field, not in the query.")
        return await _receive_multipart(request, service)
    upload = _Upload()
    upload.filename = filename
    upload.config = (config or "").encode()
    _check_config_size(len(upload.config), service)
    check_config(upload.config)  # before gigabytes are received for nothing
    upload.blob = await _store(service, chunks(request, service.settings.upload_idle_seconds))
    return upload


async def _receive_multipart(request: Request, service: Service) -> _Upload:
    upload = _Upload()
    reader = MultipartReader(request, service.settings.upload_idle_seconds)
    events = reader.read()
    seen: set[str] = set()
    async for event in events:
        if not isinstance(event, Part):
            continue
        if event.name in seen or event.name not in ("checkpoint", "config", "calibration"):
            raise BadInput(
                f"The form has an unexpected or repeated field {event.name[:80]!r}.",
                remedy="Send one `checkpoint` file and at most one `config` and `calibration`.",
            )
        seen.add(event.name)
        if event.name == "checkpoint":
            upload.filename = event.filename
            upload.blob = await _store(service, _content(events))
        elif event.name == "calibration":
            upload.calibration = await _store(service, _content(events))
        else:
            async for piece in _content(events):
                _check_config_size(len(upload.config) + len(piece), service)
                upload.config += piece
            check_config(upload.config)
    if upload.blob is None:
        raise BadInput(
            "The form has no `checkpoint`.",
            remedy="Send the file as curl -F checkpoint=@FILE does.",
        )
    return upload


async def _content(events: AsyncIterator[Part | bytes | None]) -> AsyncIterator[bytes]:
    """The bytes of the part that has just begun."""
    async for event in events:
        if not isinstance(event, bytes):
            return
        yield event


async def _store(service: Service, source: AsyncIterator[bytes]) -> BlobRef:
    """Write a stream to the blob store in large pieces, off the loop; memory stays bounded."""
    writer: BlobWriter = await in_thread(
        service.blobs.writer, max_bytes=service.settings.max_upload_bytes
    )
    try:
        buffer = bytearray()
        async for chunk in source:
            buffer += chunk
            if len(buffer) >= _WRITE_BYTES:
                await in_thread(writer.write, buffer)
                buffer.clear()
        if buffer:
            await in_thread(writer.write, buffer)
        return await in_thread(writer.commit)
    except UploadTooLarge:
        raise _too_large(service.settings.max_upload_bytes) from None
    finally:
        # Shielded: a client that leaves must not leave its temporary file behind.
        await asyncio.shield(run_in_threadpool(writer.abort))


def _too_large(limit: int) -> UploadTooLarge:
    return UploadTooLarge(f"The checkpoint is larger than {limit} bytes.", limit=limit)


def _check_config_size(size: int, service: Service) -> None:
    if size > service.settings.max_config_bytes:
        raise InvalidConfig(
            f"The config is larger than {service.settings.max_config_bytes} bytes.",
            remedy="Shorten it, or raise FOLDSERVE_MAX_CONFIG_BYTES.",
        )


def _wait_seconds(prefer: str | None, service: Service) -> float | None:
    found = _WAIT.search(prefer or "")
    return None if found is None else min(float(found[1]), service.settings.max_wait_seconds)


async def _final(service: Service, record: VersionRecord, seconds: float) -> VersionRecord:
    """The record once its state is final, or as it is when the time is up."""
    deadline = time.monotonic() + seconds
    pause = 0.02
    while not record.state.final and (left := deadline - time.monotonic()) > 0:
        if service.draining:  # the version stays queued, and a later start takes it up
            break
        await asyncio.sleep(min(pause, left))
        pause = min(pause * 1.3, 0.25)
        record = await in_thread(service.catalog.get_version, record.model, record.version)
    return record


async def _answer(
    request: Request, service: Service, record: VersionRecord, seconds: float | None
) -> Response:
    location = version_path(record.model, record.version)
    headers = {"Location": location}
    if seconds is not None:
        headers["Preference-Applied"] = f"wait={seconds:g}"
    if record.state == State.REJECTED:
        body = problems.document(
            record.error or {}, request.url.path, version=record.version, location=location
        )
        return problems.response(body, headers)
    model = await in_thread(service.catalog.get_model, record.model)
    body = version_resource(record, model.default_version)
    status = 201 if record.state == State.READY else 202
    return Response(json_bytes(body), status, headers, "application/json")
