"""What the catalog answers: frozen values that stay as they were when they were read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, Self, TypeVar

from service.store.schema import BenchmarkRow, EventRow, ModelRow, VersionRow

Json = dict[str, Any]
T = TypeVar("T")


class State(StrEnum):
    """Where a version stands. `ready` and `rejected` are final."""

    QUEUED = "queued"
    CONVERTING = "converting"
    READY = "ready"
    REJECTED = "rejected"

    @property
    def final(self) -> bool:
        """Whether the state never changes again."""
        return self in (State.READY, State.REJECTED)


@dataclass(frozen=True)
class CheckpointRecord:
    """The uploaded file: `bytes` is its length; `form` ("train" | "deploy") is known once read."""

    sha256: str
    bytes: int
    filename: str | None
    form: str | None


@dataclass(frozen=True)
class ModelRecord:
    """One model. `pinned` says that the default was chosen by hand and new versions leave it."""

    name: str
    default_version: int | None
    pinned: bool
    created_at: datetime

    @classmethod
    def of(cls, row: ModelRow) -> Self:
        """The row's values at this moment; a later change of the row does not show."""
        return cls(row.name, row.default_version, row.default_pinned, row.created_at)


@dataclass(frozen=True)
class VersionRecord:
    """One version of a model; `artifacts` maps a kind ("deploy", "report", ...) to a sha256."""

    model: str
    version: int
    state: State
    checkpoint: CheckpointRecord
    config: Json
    architecture: Json | None
    fusion: Json | None
    error: Json | None
    progress: Json | None
    artifacts: Mapping[str, str]
    attempts: int
    worker: str | None
    created_at: datetime
    updated_at: datetime
    servable: bool = True

    @classmethod
    def of(cls, row: VersionRow) -> Self:
        """The row's values at this moment, with its model's name and its artifacts by kind."""
        return cls(
            model=row.model.name,
            version=row.number,
            state=State(row.state),
            checkpoint=CheckpointRecord(
                row.checkpoint_sha256,
                row.checkpoint_bytes,
                row.checkpoint_filename,
                row.checkpoint_form,
            ),
            config=row.config,
            architecture=row.architecture,
            fusion=row.fusion,
            error=row.error,
            progress=row.progress,
            artifacts={artifact.kind: artifact.sha256 for artifact in row.artifacts},
            attempts=row.attempts,
            worker=row.worker,
            created_at=row.created_at,
            updated_at=row.updated_at,
            servable=row.servable,
        )


@dataclass(frozen=True)
class EventRecord:
    """One thing that happened to a version; `number` counts from 1 without gaps."""

    number: int
    kind: str
    data: Json
    created_at: datetime

    @classmethod
    def of(cls, row: EventRow) -> Self:
        """The row's values; events are never changed."""
        return cls(row.number, row.kind, row.data, row.created_at)


@dataclass(frozen=True)
class BenchmarkRecord:
    """One measurement of a version."""

    model: str
    version: int
    result: Json
    created_at: datetime

    @classmethod
    def of(cls, row: BenchmarkRow, model: str, version: int) -> Self:
        """The row's result; `model` and `version` are those by which the caller found it."""
        return cls(model, version, row.result, row.created_at)


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of a list; `next_cursor` fetches the part after it and is None at the end."""

    items: tuple[T, ...]
    next_cursor: str | None
