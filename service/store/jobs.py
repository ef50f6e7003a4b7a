"""The state machine of a version, as functions on a session inside a writing transaction.

    queued --claim--> converting --publish--> ready
      ^                   |  |
      +----recover--------+  +--reject--> rejected

Each step is recorded as an event of kind "state". A worker that lost its version (it was deleted,
or taken up again by another worker) learns so from VersionNotFound or Conflict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from service.errors import Conflict, ConversionInterrupted, VersionNotFound
from service.store.records import Json, State
from service.store.schema import ArtifactRow, EventRow, ModelRow, VersionRow, utc_now

MAX_NUMBER = 2**31 - 1
"""Largest version and event number that the columns hold."""


def find_version(session: Session, model: str, version: int, *, lock: bool = False) -> VersionRow:
    """The version's row, locked against other writers if asked. Raises VersionNotFound."""
    query = (
        select(VersionRow)
        .join(VersionRow.model)
        .where(ModelRow.name == model, ~ModelRow.deleted, VersionRow.number == version)
    )
    if lock:
        query = query.with_for_update(of=VersionRow)
    row = session.scalars(query).one_or_none() if 0 < version <= MAX_NUMBER else None
    if row is None:
        raise VersionNotFound(f"Model {model!r} has no version {version}.")
    return row


def append_event(session: Session, row: VersionRow, kind: str, data: Json) -> int:
    """Add an event to a locked version and return its number."""
    row.last_event += 1
    session.add(EventRow(version_id=row.id, number=row.last_event, kind=kind, data=data))
    return row.last_event


def move(session: Session, row: VersionRow, state: State, **facts: Any) -> None:
    """Put a locked version into `state` and say so in its events."""
    row.state = state.value
    row.updated_at = utc_now()
    append_event(session, row, "state", {"state": state.value, **facts})


def claim(session: Session, worker: str) -> VersionRow | None:
    """Give the oldest queued version to `worker`, or None.

    PostgreSQL skips the rows that other workers are just claiming; SQLite has one writer at a
    time and ignores the clause. The state is compared again in the update, so that no two
    workers get the same version on any database.
    """
    oldest = (
        select(VersionRow.id)
        .where(VersionRow.state == State.QUEUED)
        .order_by(VersionRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    claimed = session.execute(
        update(VersionRow)
        .where(VersionRow.id == oldest, VersionRow.state == State.QUEUED)
        .values(worker=worker, attempts=VersionRow.attempts + 1, state=State.CONVERTING.value)
        .returning(VersionRow.id)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    if claimed is None:
        return None
    row = session.get_one(VersionRow, claimed)
    move(session, row, State.CONVERTING, attempt=row.attempts)
    return row


def require_converting(row: VersionRow, worker: str | None) -> None:
    """Raises Conflict unless the version is being converted, by `worker` if one is named."""
    if row.state != State.CONVERTING:
        raise Conflict(f"Version {row.number} is {row.state}, not converting.")
    if worker is not None and row.worker != worker:
        raise Conflict(f"Version {row.number} was taken up by another worker.")


def require_ready(row: VersionRow) -> None:
    """Raises Conflict unless the version is ready."""
    if row.state != State.READY:
        raise Conflict(f"Version {row.number} is {row.state}, not ready.")


def publish(
    session: Session,
    row: VersionRow,
    *,
    form: str,
    architecture: Json,
    fusion: Json,
    artifacts: Mapping[str, str],
    servable: bool,
) -> None:
    """Make a converting version ready, and the default unless that is pinned or newer.

    A version that cannot be served never becomes the default.

    The caller holds the locks of the model's row and of the version's, taken in that order.
    """
    row.checkpoint_form, row.architecture, row.fusion = form, architecture, fusion
    row.error, row.servable = None, servable
    uploaded = [artifact for artifact in row.artifacts if artifact.kind not in artifacts]
    made = [ArtifactRow(kind=kind, sha256=sha) for kind, sha in artifacts.items()]
    row.artifacts = [*uploaded, *made]
    move(session, row, State.READY)
    model = row.model
    if servable and not model.default_pinned and (model.default_version or 0) < row.number:
        model.default_version = row.number


def reject(session: Session, row: VersionRow, error: Json) -> None:
    """Make a locked version rejected with the error that says why."""
    row.error = error
    move(session, row, State.REJECTED, code=error.get("code"))


def release(session: Session, row: VersionRow) -> None:
    """Put a locked version back in the queue, as if it had never been claimed."""
    row.worker, row.progress = None, None
    row.attempts -= 1
    move(session, row, State.QUEUED, attempt=row.attempts)


def recover(
    session: Session, max_attempts: int, stale_seconds: float, dead: Collection[str]
) -> list[VersionRow]:
    """Queue interrupted conversions again, or reject those tried `max_attempts` times."""
    silent = VersionRow.updated_at <= utc_now() - timedelta(seconds=stale_seconds)
    rows = session.scalars(
        select(VersionRow)
        .where(VersionRow.state == State.CONVERTING, or_(silent, VersionRow.worker.in_(list(dead))))
        .order_by(VersionRow.id)
        .with_for_update(of=VersionRow, skip_locked=True)
    ).all()
    for row in rows:
        row.worker = None
        if row.attempts >= max_attempts:
            error = ConversionInterrupted(
                f"The service was interrupted in {row.attempts} conversions of this version.",
                attempts=row.attempts,
            )
            reject(session, row, error.to_dict())
        else:
            row.progress = None
            move(session, row, State.QUEUED, attempt=row.attempts)
    return list(rows)


def newest_ready(session: Session, model: ModelRow, *, without: int) -> int | None:
    """The highest servable version number of a model other than `without`."""
    return session.scalar(
        select(func.max(VersionRow.number)).where(
            VersionRow.model_id == model.id,
            VersionRow.state == State.READY,
            VersionRow.servable,
            VersionRow.number != without,
        )
    )
