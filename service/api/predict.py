"""Predictions: images, npy or JSON in; labels and scores, npy or arrays out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter, Query
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from service import errors
from service.api import images, problems, tensors
from service.api.bodies import MultipartReader, Part, media_type, too_large, whole, whole_or_view
from service.api.direct import DirectRoute, direct
from service.api.documented import inlined, refusals
from service.api.encoding import json_bytes
from service.api.inference import compute, find_hosted, server_timing, unless_departed
from service.api.known import KnownResponse
from service.api.schemas import ArraysAnswer, PredictionAnswer
from service.api.state import Service, of
from service.api.uploads import ModelName
from service.errors import BadInput, UnsupportedMediaType
from service.hosting import Hosted
from service.serving import BatchPart, Form, Result, Rows, as_tensor, too_many

T = TypeVar("T")
router = APIRouter(route_class=DirectRoute, tags=["predict"])

ARRAYS = "application/vnd.foldserve.arrays+json"
_JSON = "application/json"
_BINARY_PART = "application/octet-stream"  # what clients say of files whose name tells them nothing
_TYPES = (*images.FORMATS, "multipart/form-data", tensors.NPY, _JSON)
_FORMS: Mapping[str, Form] = {"deploy": "deploy", "train": "train"}
_BOOLEANS: Mapping[str, bool] = {"true": True, "false": False}
# Bodies up to these sizes are read in less time than it takes to wake another thread for them.
_QUICK_JSON_BYTES = 1 << 15
_QUICK_NPY_BYTES = 1 << 20
_PARAMETERS = {"version", "form", "top_k", "timing"}


class _Asked(NamedTuple):
    """The query of a prediction, checked."""

    version: int | None
    form: Form
    top_k: int
    timing: bool = False


async def predict(request: Request) -> Response:
    """Read, check, run, answer; see `documented` for what it takes."""
    service = of(request)
    name: str = request.path_params["name"]
    asked = _asked(request.query_params if request.scope["query_string"] else {}, service)
    found = await find_hosted(service, name, asked.version)
    if (full := found.full(asked.form)) is not None:
        return problems.error_response(full, request.scope["path"])
    rows = await _rows(request, service, found, asked.form)
    work = compute(service, found, asked.version, rows, asked.form)
    found, result = await unless_departed(request, work)
    return _answer(request, found, asked, result)


@router.post(
    "/v1/models/{name}/predict",
    summary="Predict",
    response_model=PredictionAnswer,
    responses=refusals(
        errors.ModelNotFound,
        errors.VersionNotFound,
        errors.VersionNotReady,
        errors.FormNotAvailable,
        errors.NotServable,
        errors.NameInvalid,
        errors.BadInput,
        errors.UnsupportedMediaType,
        errors.UploadTooLarge,
        errors.ImageTooLarge,
        errors.RequestStalled,
        errors.QueueFull,
        errors.DeadlineExceeded,
        errors.NotLoaded,
        errors.BackendFailed,
        also={
            200: {
                "description": "Labels and scores; by `Accept` one npy array, or the raw outputs.",
                "content": {
                    _JSON: {"schema": inlined(PredictionAnswer)},
                    tensors.NPY: {"schema": {"type": "string", "format": "binary"}},
                    ARRAYS: {"schema": inlined(ArraysAnswer)},
                },
            }
        },
    ),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                **{
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in (*images.FORMATS, tensors.NPY)
                },
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "properties": {
                            "image": {
                                "type": "array",
                                "items": {"type": "string", "format": "binary"},
                            }
                        },
                    }
                },
                _JSON: {
                    "schema": {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {
                            "inputs": {
                                "oneOf": [
                                    {"type": "array", "items": {}},
                                    {"type": "object", "additionalProperties": {"type": "array"}},
                                ]
                            }
                        },
                        "example": {"inputs": [[[[0.0, 0.5], [0.5, 1.0]]]]},
                    }
                },
            },
        }
    },
)
@direct(predict)
async def documented(
    name: ModelName,
    version: Annotated[int | None, Query(ge=1, description="Default: the one that serves.")] = None,
    form: Annotated[
        Literal["deploy", "train"],
        Query(description="The fused network, or the uploaded one as it was trained."),
    ] = "deploy",
    top_k: Annotated[int | None, Query(ge=1, description="How many labels a row gets.")] = None,
    timing: Annotated[
        bool, Query(description="Say in `Server-Timing` how long it waited and computed, in ms.")
    ] = False,
) -> None:
    """Classify images or run arrays.

    The body is one image, several images as multipart, one float32 npy array [N, C, H, W] (or one
    row without N), or JSON `{"inputs": …}` of the same shape. Images are preprocessed as the
    version's resource says; arrays are taken as they are, except one of uint8 [N, H, W, C]: those
    are RGB or grey images of the network's size, which only need to be normalised. A network with
    several inputs takes JSON `{"inputs": {name: …}}`. With `Accept: application/x-npy` the
    answer is one float32 array: outputs are flattened per row and concatenated when the network
    has several.
    """


def _asked(query: Mapping[str, str], service: Service) -> _Asked:
    if not query:
        return _Asked(None, "deploy", service.settings.top_k)
    unknown = sorted(set(query) - _PARAMETERS)
    if unknown:
        raise BadInput(
            f"{unknown[0][:40]!r} is not a parameter of predict.",
            remedy=f"It has {', '.join(sorted(_PARAMETERS))}.",
        )
    asked_form = query.get("form", "deploy")
    form = _FORMS.get(asked_form)
    if form is None:
        raise BadInput(f"`form` is {asked_form[:40]!r}.", remedy="Use deploy or train.")
    version = _whole_number(query, "version")
    timing = _BOOLEANS.get(query.get("timing", "false"))
    if timing is None:
        raise BadInput(f"`timing` is {query['timing'][:40]!r}.", remedy="Use true or false.")
    top_k = _whole_number(query, "top_k") or service.settings.top_k
    return _Asked(version, form, top_k, timing)


def _whole_number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise BadInput(f"`{name}` is {text[:40]!r}.", remedy="Use a whole number from 1 on.")
    return int(text)


def _is_plain(hosted: Hosted) -> bool:
    """Whether the model takes one input of floating-point numbers, as images and npy bodies are."""
    return len(hosted.inputs) == 1 and hosted.inputs[0].dtype.is_floating_point


def _check_plain(hosted: Hosted) -> None:
    if not _is_plain(hosted):
        raise BadInput(
            f"The model takes {', '.join(f'{s.name} ({s.dtype})' for s in hosted.inputs)}.",
            remedy='Send JSON {"inputs": {name: nested lists}}.',
        )


async def _rows(request: Request, service: Service, hosted: Hosted, form: Form) -> Rows:
    """The request's rows: [N, *item_shape] in float32, or an array for each of several inputs."""
    settings = service.settings
    kind = media_type(request)
    if kind == "multipart/form-data":
        _check_plain(hosted)
        files = await _image_parts(request, service)
        return await _decode(service, hosted, form, files)
    if kind not in _TYPES:
        raise UnsupportedMediaType(
            f"The body has the type {kind!r}." if kind else "The body has no Content-Type.",
            remedy=f"Send one of {', '.join(_TYPES)}.",
        )
    limit, name = (
        (settings.max_json_bytes, "FOLDSERVE_MAX_JSON_BYTES")
        if kind == _JSON
        else (settings.max_body_bytes, "FOLDSERVE_MAX_BODY_BYTES")
    )
    if kind not in (_JSON, tensors.NPY):
        image = await whole(request, limit, settings.body_idle_seconds, name)
        _check_plain(hosted)
        return await _decode(service, hosted, form, [image])
    body = await whole_or_view(request, limit, settings.body_idle_seconds, name)
    if kind == _JSON and not _is_plain(hosted):
        with hosted.expecting(form, 1):
            return await _on_thread(service, tensors.named_from_json, body, hosted.inputs)
    _check_plain(hosted)
    if kind == _JSON:
        if len(body) <= _QUICK_JSON_BYTES:
            return tensors.from_json(body, hosted.item_shape)
        with hosted.expecting(form, 1):
            return await _on_thread(service, tensors.from_json, body, hosted.item_shape)
    head = tensors.read_head(body)
    if head.promises_levels and _how(hosted) is not None:
        count = head.images(hosted.item_shape)
        if count > settings.queue_rows:  # before they take four times the memory
            raise too_many(count, settings.queue_rows)
        with hosted.expecting(form, count):
            return await _on_thread(service, _levels, body, hosted, form)
    if len(body) <= _QUICK_NPY_BYTES:
        return tensors.from_npy(body, hosted.item_shape, head)
    with hosted.expecting(form, 1):
        return await _on_thread(service, tensors.from_npy, body, hosted.item_shape, head)


async def _image_parts(request: Request, service: Service) -> list[bytearray]:
    settings = service.settings
    files: list[bytearray] = []
    size = 0
    reader = MultipartReader(request, settings.body_idle_seconds)
    async for event in reader.read():
        if isinstance(event, Part):
            if event.media_type not in images.FORMATS and event.media_type != _BINARY_PART:
                raise UnsupportedMediaType(
                    f"A part has the type {event.media_type or 'text/plain'!r}.",
                    remedy=f"Send parts of {', '.join(images.FORMATS)}.",
                )
            if len(files) == settings.max_images:
                raise BadInput(
                    f"The form has more than {settings.max_images} images.",
                    remedy="Send fewer at a time, or raise FOLDSERVE_MAX_IMAGES.",
                )
            files.append(bytearray())
        elif event is not None:
            size += len(event)
            if size > settings.max_body_bytes:
                raise too_large(settings.max_body_bytes, "FOLDSERVE_MAX_BODY_BYTES")
            files[-1] += event
    if not files:
        raise BadInput("The form has no images.", remedy="Send files as curl -F image=@FILE does.")
    return files


async def _decode(
    service: Service, hosted: Hosted, form: Form, files: Sequence[bytes | bytearray]
) -> Rows:
    how = _recipe(hosted)
    limits = service.settings.max_image_pixels, service.settings.max_image_scans
    raw = hosted.takes_levels(form)
    decode: Callable[..., NDArray[Any]] = images.decode_levels if raw else images.decode
    with hosted.expecting(form, len(files)):
        rows = await asyncio.gather(
            *(_on_thread(service, decode, file, how, *limits) for file in files)
        )
    batch = rows[0][None] if len(rows) == 1 else np.stack(rows)
    return _part(batch, how) if raw else batch


def _levels(body: tensors.Bytes, hosted: Hosted, form: Form) -> Rows:
    """Images that came as an array of grey levels, normalised here or on the device."""
    how = _recipe(hosted)
    pixels = images.in_order(tensors.levels_from_npy(body, hosted.item_shape), how)
    return _part(pixels, how) if hosted.takes_levels(form) else images.normalised(pixels, how)


def _part(pixels: NDArray[np.uint8], how: images.ImageRecipe) -> Rows:
    return BatchPart((as_tensor(pixels),), images.levels(how))


def _how(hosted: Hosted) -> images.ImageRecipe | None:
    """How its images are preprocessed; None if it takes none."""
    return images.recipe(hosted.item_shape, hosted.preprocessing)


def _recipe(hosted: Hosted) -> images.ImageRecipe:
    how = _how(hosted)
    if how is None:
        raise BadInput(
            f"Rows of shape {list(hosted.item_shape)} are no images.",
            remedy="Send an array as application/x-npy or JSON.",
        )
    return how


async def _on_thread(service: Service, function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(service.decoders, function, *args)


def _answer(request: Request, hosted: Hosted, asked: _Asked, result: Result) -> Response:
    accept = request.headers.get("accept", "")
    headers = (("Foldserve-Version", str(hosted.version)),)
    own = (("Server-Timing", server_timing(result.timing)),) if asked.timing else ()
    if tensors.NPY in accept:
        body = tensors.to_npy(tensors.joined(result.outputs))
        return KnownResponse(body, tensors.NPY, headers, own)
    head = {"model": hosted.model, "version": hosted.version, "form": asked.form}
    outputs = result.outputs
    if ARRAYS in accept or len(outputs) != 1 or outputs[0].ndim != 2:
        arrays = [{"shape": output.shape, "data": _plain(output)} for output in outputs]
        body = json_bytes(head | {"outputs": arrays})
        return KnownResponse(body, ARRAYS if ARRAYS in accept else _JSON, headers, own)
    top = _top(outputs[0], asked.top_k, hosted.labels)
    return KnownResponse(json_bytes(head | {"predictions": top}), _JSON, headers, own)


def _plain(output: NDArray[Any]) -> NDArray[Any]:
    """Contiguous and in a type that the JSON encoder takes."""
    wide = output.astype(np.float32) if output.dtype == np.float16 else output
    return np.ascontiguousarray(wide)


def _top(logits: NDArray[Any], top_k: int, labels: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The `top_k` classes of every row of [N, classes] with their softmax probabilities."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    scores = np.exp(shifted)
    scores /= scores.sum(axis=1, keepdims=True)
    # Stable and over the logits, so that equal probabilities keep the order of their classes.
    best = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    return [
        {
            "top": [
                {
                    "label": labels[index] if labels else str(index),
                    "index": int(index),
                    "score": float(row_scores[index]),
                }
                for index in row_best
            ]
        }
        for row_scores, row_best in zip(scores, best, strict=True)
    ]
