"""The catalog: which models and versions there are, and how far each one is.

It holds everything but the bytes of checkpoints and artifacts, which are blobs known by their
hash. Every method is one transaction and safe to call from any thread; several processes may
share one database. Methods answer frozen records and raise errors of `StoreError`.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from service.errors import (
    BadInput,
    Conflict,
    ModelNotFound,
    NotServable,
    StorageFull,
    StoreError,
)
from service.store import jobs, references
from service.store.database import open_engine, writing
from service.store.keys import KeyTable
from service.store.names import check_model_name, clean_filename
from service.store.records import (
    BenchmarkRecord,
    EventRecord,
    Json,
    ModelRecord,
    Page,
    State,
    VersionRecord,
)
from service.store.schema import ArtifactRow, BenchmarkRow, EventRow, ModelRow, VersionRow, utc_now

MAX_PAGE = 1000
"""Most items in one page; a larger `limit` is lowered to this."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def sqlite_url(path: Path) -> str:
    """The database URL of a SQLite file."""
    return f"sqlite:///{path.absolute()}"


class Catalog:
    """Models, versions, events and benchmarks in one SQL database; `keys` are its API keys."""

    def __init__(self, database_url: str) -> None:
        """Open `database_url` and bring its schema up to date."""
        with _database_errors():
            self._engine = open_engine(database_url)
        self._writing = writing(self._engine)
        self.keys = KeyTable(self._reads, self._writes)

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    # ---- models -------------------------------------------------------------------------

    def get_model(self, model: str) -> ModelRecord:
        """Raises NameInvalid or ModelNotFound."""
        with self._reads() as session:
            return ModelRecord.of(_model(session, model))

    def list_models(self, cursor: str | None = None, limit: int = 100) -> Page[ModelRecord]:
        """Models by name; the cursor is the last name of the page before."""
        query = select(ModelRow).where(~ModelRow.deleted, ModelRow.name > (cursor or ""))
        with self._reads() as session:
            rows = session.scalars(query.order_by(ModelRow.name).limit(_limit(limit) + 1)).all()
            items = tuple(ModelRecord.of(row) for row in rows[: _limit(limit)])
        return Page(items, items[-1].name if len(rows) > len(items) else None)

    def defaults(self) -> dict[str, int | None]:
        """The default version of every model."""
        query = select(ModelRow.name, ModelRow.default_version).where(~ModelRow.deleted)
        with self._reads() as session:
            rows = session.execute(query.order_by(ModelRow.name)).all()
        return {row.name: row.default_version for row in rows}

    def set_default(self, model: str, version: int | None) -> ModelRecord:
        """Pin the default to a ready version, or with None unpin it: the newest ready serves.

        Raises ModelNotFound, VersionNotFound, Conflict when the version is not ready, or
        NotServable.
        """
        with self._writes() as session:
            row = _model(session, model, lock=True)
            if version is None:
                row.default_version = jobs.newest_ready(session, row, without=0)
            else:
                found = jobs.find_version(session, model, version)
                if found.state != State.READY:
                    raise Conflict(f"Version {version} is {found.state}; only ready ones serve.")
                if not found.servable:
                    raise NotServable(f"Version {version} has no program to run.")
                row.default_version = version
            row.default_pinned = version is not None
            return ModelRecord.of(row)

    def delete_model(self, model: str) -> None:
        """Forget a model and its versions, in whatever state they are.

        A model made again under the name goes on counting, so that a version number never
        means two things. Blobs stay until they are collected. Raises ModelNotFound.
        """
        with self._writes() as session:
            row = _model(session, model, lock=True)
            session.execute(delete(VersionRow).where(VersionRow.model_id == row.id))
            row.deleted, row.default_version, row.default_pinned = True, None, False

    # ---- versions -----------------------------------------------------------------------

    def create_version(
        self,
        model: str,
        sha256: str,
        size: int,
        filename: str | None,
        config: Json,
        artifacts: Mapping[str, str] | None = None,
        *,
        present: references.Present | None = None,
    ) -> VersionRecord:
        """Queue an uploaded checkpoint as the model's next version; makes the model if need be.

        `sha256` and `size` (bytes) are those of its blob; `filename` is for display only and is
        cleaned; `artifacts` maps the kinds of what came with it to their blobs. Concurrent callers
        get different numbers. `present` tells whether a blob is in the store; it is asked where no
        collector can come in between. Raises NameInvalid, or Conflict when a blob is gone.
        """
        check_model_name(model)
        if _SHA256.fullmatch(sha256) is None or size < 0:
            raise ValueError("create_version needs the sha256 and size of a blob")
        self._ensure_model(model)
        with self._writes() as session:
            references.add(session, [sha256, *(artifacts or {}).values()], present)
            counted = (
                update(ModelRow)
                .where(ModelRow.name == model)
                .values(last_version=ModelRow.last_version + 1, deleted=False)
                .returning(ModelRow)
            )
            row = VersionRow(
                model=(owner := session.scalars(counted).one()),
                number=owner.last_version,
                state=State.QUEUED.value,
                checkpoint_sha256=sha256,
                checkpoint_bytes=size,
                checkpoint_filename=clean_filename(filename),
                config=config,
                last_event=0,
                attempts=0,
                artifacts=[ArtifactRow(kind=k, sha256=sha) for k, sha in (artifacts or {}).items()],
            )
            session.add(row)
            session.flush()
            jobs.move(session, row, State.QUEUED)
            return VersionRecord.of(row)

    def get_version(self, model: str, version: int) -> VersionRecord:
        """Raises NameInvalid, ModelNotFound or VersionNotFound."""
        with self._reads() as session:
            _model(session, model)
            return VersionRecord.of(jobs.find_version(session, model, version))

    def list_versions(
        self,
        model: str | None = None,
        cursor: str | None = None,
        limit: int = 100,
        *,
        state: State | None = None,
    ) -> Page[VersionRecord]:
        """Versions, the newest first: of one model, or of all when `model` is None.

        Raises ModelNotFound, or BadInput for a cursor that no list gave.
        """
        key = VersionRow.id if model is None else VersionRow.number
        query = select(VersionRow).join(VersionRow.model).where(~ModelRow.deleted)
        if cursor is not None:
            query = query.where(key < _number(cursor))
        if state is not None:
            query = query.where(VersionRow.state == state)
        with self._reads() as session:
            if model is not None:
                query = query.where(VersionRow.model_id == _model(session, model).id)
            rows = session.scalars(query.order_by(key.desc()).limit(_limit(limit) + 1)).all()
            shown = rows[: _limit(limit)]
            items = tuple(VersionRecord.of(row) for row in shown)
            more = len(rows) > len(shown)
            last = (shown[-1].id if model is None else shown[-1].number) if more else None
        return Page(items, None if last is None else str(last))

    def delete_version(self, model: str, version: int) -> None:
        """Forget one version, in whatever state it is; its number is not given out again.

        A worker that is converting it learns so at its next report. If it was the default, the
        newest ready version left becomes the default, unpinned. Raises VersionNotFound.
        """
        with self._writes() as session:
            owner = _model(session, model, lock=True)
            row = jobs.find_version(session, model, version, lock=True)
            if owner.default_version == version:
                owner.default_version = jobs.newest_ready(session, owner, without=version)
                owner.default_pinned = False
            session.execute(delete(VersionRow).where(VersionRow.id == row.id))

    # ---- conversion ---------------------------------------------------------------------

    def claim_next(self, worker: str) -> VersionRecord | None:
        """Take the oldest queued version for conversion, or None when there is none."""
        with self._writes() as session:
            row = jobs.claim(session, worker)
            return None if row is None else VersionRecord.of(row)

    def set_progress(
        self, model: str, version: int, progress: Json, *, worker: str | None = None
    ) -> None:
        """Store how far a conversion is and append it as an event of kind "progress".

        It also counts as the worker's sign of life. Raises VersionNotFound when the version was
        deleted and Conflict when `worker` no longer holds it: the worker should then stop.
        """
        with self._writes() as session:
            row = jobs.find_version(session, model, version, lock=True)
            jobs.require_converting(row, worker)
            row.progress, row.updated_at = progress, utc_now()
            jobs.append_event(session, row, "progress", progress)

    def publish(
        self,
        model: str,
        version: int,
        *,
        form: str,
        architecture: Json,
        fusion: Json,
        artifacts: Mapping[str, str],
        servable: bool = True,
        worker: str | None = None,
        present: references.Present | None = None,
    ) -> VersionRecord:
        """Make a converted version ready; `artifacts` maps kinds to the sha256 of their blobs.

        It becomes the model's default too, unless the default is pinned or a newer version, or it
        is not `servable`: converted for download only. `present` is that of `create_version`.
        Raises VersionNotFound, or Conflict when it is not converting (by `worker`, if named) or
        when a blob is not there any more.
        """
        with self._writes() as session:
            references.add(session, artifacts.values(), present)
            # The model first, as every method locks them: two orders could deadlock.
            session.execute(select(ModelRow.id).where(ModelRow.name == model).with_for_update())
            row = jobs.find_version(session, model, version, lock=True)
            jobs.require_converting(row, worker)
            jobs.publish(
                session,
                row,
                form=form,
                architecture=architecture,
                fusion=fusion,
                artifacts=artifacts,
                servable=servable,
            )
            session.flush()
            return VersionRecord.of(row)

    def reject(
        self, model: str, version: int, error: Json, *, worker: str | None = None
    ) -> VersionRecord:
        """Give a version up, keeping its bytes and `error` (`FoldserveError.to_dict`).

        Raises VersionNotFound, or Conflict when it is not converting (by `worker`, if named).
        """
        with self._writes() as session:
            row = jobs.find_version(session, model, version, lock=True)
            jobs.require_converting(row, worker)
            jobs.reject(session, row, error)
            return VersionRecord.of(row)

    def show_life(self, model: str, version: int, *, worker: str) -> None:
        """The worker is still at it. Raises as `set_progress` does."""
        with self._writes() as session:
            row = jobs.find_version(session, model, version, lock=True)
            jobs.require_converting(row, worker)
            row.updated_at = utc_now()

    def release(self, model: str, version: int, *, worker: str) -> None:
        """Put a claimed version back in the queue; the attempt does not count.

        Raises VersionNotFound, or Conflict when the worker does not hold it.
        """
        with self._writes() as session:
            row = jobs.find_version(session, model, version, lock=True)
            jobs.require_converting(row, worker)
            jobs.release(session, row)

    def recover_interrupted(
        self, max_attempts: int = 2, *, stale_seconds: float = 0.0, dead: Collection[str] = ()
    ) -> tuple[VersionRecord, ...]:
        """Queue versions left converting again, or reject them as interrupted.

        A version is rejected (`conversion_interrupted`) once it was tried `max_attempts` times.
        Taken up are the conversions without a sign of life for `stale_seconds`, and those of the
        workers that are known to be `dead`. Returns the versions it changed.
        """
        with self._writes() as session:
            rows = jobs.recover(session, max_attempts, stale_seconds, dead)
            return tuple(VersionRecord.of(row) for row in rows)

    def add_artifact(
        self,
        model: str,
        version: int,
        kind: str,
        sha256: str,
        *,
        present: references.Present | None = None,
    ) -> VersionRecord:
        """Record a further file of a ready version, in the place of one of the same kind.

        Raises VersionNotFound when it was deleted meanwhile, or Conflict when it is not ready, or
        its blob not `present`.
        """
        with self._writes() as session:
            references.add(session, [sha256], present)
            row = jobs.find_version(session, model, version, lock=True)
            jobs.require_ready(row)
            session.merge(ArtifactRow(version_id=row.id, kind=kind, sha256=sha256))
            session.flush()
            session.refresh(row)
            return VersionRecord.of(row)

    def set_config(self, model: str, version: int, changes: Json) -> VersionRecord:
        """Replace fields of a version's config, None meaning that a field is left out.

        The version may be in any state. Raises VersionNotFound.
        """
        with self._writes() as session:
            row = jobs.find_version(session, model, version, lock=True)
            row.config, row.updated_at = {**row.config, **changes}, utc_now()
            return VersionRecord.of(row)

    def events(
        self, model: str, version: int, after: int = 0, limit: int = 100
    ) -> tuple[EventRecord, ...]:
        """A version's events with numbers above `after`, in order. Raises VersionNotFound."""
        with self._reads() as session:
            row = jobs.find_version(session, model, version)
            rows = session.scalars(
                select(EventRow)
                .where(EventRow.version_id == row.id, EventRow.number > min(after, jobs.MAX_NUMBER))
                .order_by(EventRow.number)
                .limit(_limit(limit))
            )
            return tuple(EventRecord.of(event) for event in rows)

    def count_states(self) -> dict[State, int]:
        """How many versions are in each state, zero included."""
        query = select(VersionRow.state, func.count()).group_by(VersionRow.state)
        with self._reads() as session:
            found = {State(state): count for state, count in session.execute(query)}
        return {state: found.get(state, 0) for state in State}

    # ---- benchmarks and blobs -----------------------------------------------------------

    def save_benchmark(self, model: str, version: int, result: Json) -> BenchmarkRecord:
        """Store a measurement of a version. Raises VersionNotFound."""
        with self._writes() as session:
            owner = jobs.find_version(session, model, version, lock=True)
            row = BenchmarkRow(version_id=owner.id, result=result)
            session.add(row)
            session.flush()
            return BenchmarkRecord.of(row, model, version)

    def get_benchmark(self, model: str, version: int | None = None) -> BenchmarkRecord | None:
        """The last measurement of a version, or of any version of the model; None before it.

        Raises ModelNotFound or VersionNotFound.
        """
        query = (
            select(BenchmarkRow, VersionRow.number)
            .join(VersionRow, BenchmarkRow.version_id == VersionRow.id)
            .order_by(BenchmarkRow.id.desc())
            .limit(1)
        )
        with self._reads() as session:
            owner = _model(session, model)
            query = query.where(VersionRow.model_id == owner.id)
            if version is not None:
                found = jobs.find_version(session, model, version)
                query = query.where(VersionRow.id == found.id)
            first = session.execute(query).first()
        return None if first is None else BenchmarkRecord.of(first[0], model, first[1])

    def references(self) -> dict[str, tuple[str, ...]]:
        """The sha256 of every blob that is needed, and by whom: `model/version kind`."""
        with self._reads() as session:
            return references.everything(session)

    @contextmanager
    def needed(self, sha256s: Iterable[str]) -> Iterator[frozenset[str]]:
        """Those of the blobs that some version needs; within the block no other becomes needed.

        For the collector: services that add versions meanwhile wait, so the block should be short.
        """
        with self._writes() as session:
            yield references.needed(session, sha256s)

    # ---- maintenance --------------------------------------------------------------------

    def integrity_problems(self) -> tuple[str, ...]:
        """What SQLite finds wrong with its own file; PostgreSQL has `amcheck` for that."""
        if self._engine.dialect.name != "sqlite":
            return ()
        with self._reads() as session:
            rows = session.execute(text("PRAGMA integrity_check")).scalars().all()
            orphans = session.execute(text("PRAGMA foreign_key_check")).all()
        problems = [str(row) for row in rows if row != "ok"]
        return (*problems, *(f"{row[0]} row {row[1]} belongs to no {row[2]}" for row in orphans))

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy of a SQLite catalog to a new file, beside whoever writes.

        Raises StoreError for PostgreSQL, which has `pg_dump`.
        """
        if self._engine.dialect.name != "sqlite":
            raise StoreError(
                "The catalog is on PostgreSQL.", remedy="Copy it with pg_dump, then the blobs."
            )
        # Below SQLAlchemy, which would begin a transaction first.
        connection = self._engine.raw_connection()
        try:
            connection.cursor().execute("VACUUM INTO ?", (str(path),))
        except sqlite3.Error as error:
            raise _database_failed(str(error)) from error
        finally:
            connection.close()

    # ---- sessions -----------------------------------------------------------------------

    @contextmanager
    def _reads(self) -> Iterator[Session]:
        with _database_errors(), Session(self._engine) as session:
            yield session

    @contextmanager
    def _writes(self) -> Iterator[Session]:
        with (
            _database_errors(),
            Session(self._writing, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def _ensure_model(self, name: str) -> None:
        """Make the model's row; whoever comes second finds it made."""
        with self._reads() as session:
            if session.scalar(select(ModelRow.id).where(ModelRow.name == name)) is not None:
                return
        try:
            with self._writes() as session:
                session.add(ModelRow(name=name, last_version=0, default_pinned=False))
        except IntegrityError:
            return


def _model(session: Session, name: str, *, lock: bool = False) -> ModelRow:
    check_model_name(name)
    query = select(ModelRow).where(ModelRow.name == name, ~ModelRow.deleted)
    row = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise ModelNotFound(f"There is no model {name!r}.")
    return row


def _limit(limit: int) -> int:
    return max(1, min(limit, MAX_PAGE))


def _number(cursor: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", cursor):
        raise BadInput(
            f"{cursor[:40]!r} is not a cursor.", remedy="Pass the `next_cursor` of the page before."
        )
    return int(cursor)


@contextmanager
def _database_errors() -> Iterator[None]:
    """Turn a full disk and an unreachable or locked database into the store's errors."""
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        raise _database_failed(str(error.orig)) from error


def _database_failed(reason: str) -> StoreError:
    if "disk is full" in reason or "No space left" in reason:
        return StorageFull(f"The catalog could not be written: {reason}.")
    return StoreError(f"The catalog's database failed: {reason}.")
