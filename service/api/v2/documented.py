"""The protocol in OpenAPI: what its routes answer, and how they refuse."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, Field

from service import errors
from service.api import problems
from service.api.documented import Responses
from service.api.schemas import Answer
from service.errors import FoldserveError


class ErrorAnswer(BaseModel):
    """A refusal; its stable code is in the header `Foldserve-Code`."""

    error: str


class ServerMetadataAnswer(Answer):
    """Which server this is, and the extensions of the protocol that it offers."""

    name: str = Field(examples=["foldserve"])
    version: str
    extensions: list[str] = Field(examples=[["binary_tensor_data", "model_repository"]])


class LiveAnswer(Answer):
    """Always true: a server that is not live does not answer."""

    live: bool


class ReadyAnswer(Answer):
    """False while models are still being loaded, and from the beginning of the drain."""

    ready: bool


class ModelReadyAnswer(Answer):
    """Whether the version asked for, or else the default, is loaded and answers at once."""

    name: str
    ready: bool


class TensorAnswer(Answer):
    """An input or an output of a model."""

    name: str = Field(examples=["input_0"])
    datatype: str = Field(examples=["FP32"])
    shape: list[int] = Field(examples=[[-1, 3, 224, 224]])


class ModelMetadataAnswer(Answer):
    """The versions of a model that can serve, and what one of them takes and gives."""

    name: str
    versions: list[str] = Field(examples=[["1", "2"]])
    platform: str
    inputs: list[TensorAnswer]
    outputs: list[TensorAnswer]


class StatisticsAnswer(Answer):
    """One entry for each loaded version, with counts since it was loaded."""

    model_stats: list[dict[str, Any]]


class IndexEntry(Answer):
    """One version in the repository's index."""

    name: str
    version: str
    state: str = Field(examples=["READY"])
    reason: str = Field(examples=[""], description="Why it is not READY.")


class InferAnswerModel(Answer):
    """Outputs: `data` row by row, or `binary_data_size` bytes behind this JSON."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[dict[str, Any]]


def refusals(*kinds: type[FoldserveError], also: Responses | None = None) -> Responses:
    """`responses` for a route of the protocol that may raise `kinds`."""
    codes: dict[int, list[str]] = {400: ["invalid_request"], 500: ["internal_error"]}
    for kind in kinds:
        status = int(problems.status_of(kind))
        codes.setdefault(400 if status == 422 else status, []).append(kind.code())
    found: Responses = {
        status: {
            "description": f"Refused: {', '.join(f'`{name}`' for name in names)}.",
            "model": ErrorAnswer,
        }
        for status, names in sorted(codes.items())
    }
    return found | dict(also or {})


INFER_RESPONSE: Final = refusals(
    errors.ModelNotFound,
    errors.VersionNotFound,
    errors.VersionNotReady,
    errors.ModelUnloaded,
    errors.FormNotAvailable,
    errors.NotServable,
    errors.NameInvalid,
    errors.BadInput,
    errors.UnsupportedMediaType,
    errors.UploadTooLarge,
    errors.RequestStalled,
    errors.QueueFull,
    errors.DeadlineExceeded,
    errors.NotLoaded,
    errors.BackendFailed,
)

_REQUEST: Final = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {
                    "name": {"type": "string"},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "datatype": {"type": "string"},
                    "parameters": {"type": "object"},
                    "data": {"type": "array", "items": {}},
                },
            },
        },
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
            },
        },
    },
    "example": {
        "inputs": [
            {
                "name": "input_0",
                "shape": [1, 1, 2, 2],
                "datatype": "FP32",
                "data": [0.0, 0.5, 0.5, 1.0],
            }
        ]
    },
}

INFER_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _REQUEST},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
