"""Which blobs the catalog needs, and how collecting them and adding rows exclude each other.

A row is written after its blob was put, so a collector could come in between. Both therefore hold
a lock: SQLite has one writer at a time anyway; on PostgreSQL rows share an advisory lock that the
collector takes alone. Whoever adds a row looks under the lock whether the blob is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import func, select, union
from sqlalchemy.orm import Session

from service.errors import Conflict
from service.store.schema import ArtifactRow, ModelRow, VersionRow

Present = Callable[[str], bool]

_LOCK = 0x426C6F62  # any constant: names the PostgreSQL advisory lock
_CHECKPOINT = "checkpoint"


def add(session: Session, sha256s: Iterable[str], present: Present | None) -> None:
    """Before rows that need these blobs are added. Raises Conflict when one is not `present`."""
    if present is None:
        return
    session.connection()  # begins the transaction: without it SQLite's lock is not yet held
    if _on_postgresql(session):
        session.execute(select(func.pg_advisory_xact_lock_shared(_LOCK)))
    for sha256 in sha256s:
        if not present(sha256):
            raise Conflict(
                f"The blob {sha256} was collected before anything needed it.",
                remedy="Repeat the upload.",
            )


def needed(session: Session, sha256s: Iterable[str]) -> frozenset[str]:
    """Those of the blobs that some version needs; no other will be until the transaction ends."""
    if _on_postgresql(session):
        session.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    wanted = list(sha256s)
    query = union(
        select(VersionRow.checkpoint_sha256).where(VersionRow.checkpoint_sha256.in_(wanted)),
        select(ArtifactRow.sha256).where(ArtifactRow.sha256.in_(wanted)),
    )
    return frozenset(session.scalars(query))


def everything(session: Session) -> dict[str, tuple[str, ...]]:
    """Every blob that is needed, and by whom: `model/version kind`."""
    found: dict[str, list[str]] = {}
    version = (ModelRow.name, VersionRow.number)
    uploads = select(VersionRow.checkpoint_sha256, *version).join(VersionRow.model)
    made = (
        select(ArtifactRow.sha256, *version, ArtifactRow.kind)
        .join(VersionRow, ArtifactRow.version_id == VersionRow.id)
        .join(VersionRow.model)
    )
    for sha256, model, number in session.execute(uploads):
        found.setdefault(sha256, []).append(f"{model}/{number} {_CHECKPOINT}")
    for sha256, model, number, kind in session.execute(made):
        found.setdefault(sha256, []).append(f"{model}/{number} {kind}")
    return {sha256: tuple(sorted(by)) for sha256, by in found.items()}


def _on_postgresql(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"
