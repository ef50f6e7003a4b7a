"""The catalog's tables, as SQLAlchemy classes. Nothing outside `service.store` sees them.

    models ──< versions ──< artifacts      (kind -> blob)
                        ──< events         (append-only, numbered from 1 within the version)
                        ──< benchmarks     (append-only, the last one counts)
    api_keys                               (hashed; a revoked key keeps its row)

A deleted model keeps its row, because the row holds the counter that never lets a version number
come back. Only types that SQLite and PostgreSQL share are used.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

Json = dict[str, Any]


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes; SQLite stores them without a zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """To UTC before it is stored; a naive value is taken for local time."""
        return value if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Aware and in UTC; what comes back without a zone was stored as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite numbers rows itself only in a column declared exactly INTEGER.
_Id = BigInteger().with_variant(Integer, "sqlite")
_Json = JSON(none_as_null=True)


def utc_now() -> datetime:
    """The present time with its zone."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """What all tables share: each index and constraint gets a name that migrations can rely on."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        }
    )


class ModelRow(Base):
    """A name that was ever a model's; `last_version` never falls, even when it is deleted."""

    __tablename__ = "models"

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(63), unique=True)
    last_version: Mapped[int] = mapped_column(Integer, default=0)
    default_version: Mapped[int | None] = mapped_column(Integer)
    default_pinned: Mapped[bool] = mapped_column(default=False)
    deleted: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class VersionRow(Base):
    """One uploaded checkpoint and what became of it; `worker` is whoever converts or did so."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("model_id", "number"),
        Index(None, "state", "id"),
        Index(None, "checkpoint_sha256"),
    )

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16))
    servable: Mapped[bool] = mapped_column(Boolean, default=True)
    checkpoint_sha256: Mapped[str] = mapped_column(String(64))
    checkpoint_bytes: Mapped[int] = mapped_column(BigInteger)
    checkpoint_filename: Mapped[str | None] = mapped_column(String(255))
    checkpoint_form: Mapped[str | None] = mapped_column(String(16))
    config: Mapped[Json] = mapped_column(_Json)
    architecture: Mapped[Json | None] = mapped_column(_Json)
    fusion: Mapped[Json | None] = mapped_column(_Json)
    error: Mapped[Json | None] = mapped_column(_Json)
    progress: Mapped[Json | None] = mapped_column(_Json)
    last_event: Mapped[int] = mapped_column(Integer, default=0)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    worker: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)

    model: Mapped[ModelRow] = relationship(lazy="joined", innerjoin=True)
    artifacts: Mapped[list[ArtifactRow]] = relationship(
        lazy="selectin", cascade="all, delete-orphan", passive_deletes=True
    )


class ArtifactRow(Base):
    """One blob beside the checkpoint that a version needs, by its `kind`."""

    __tablename__ = "artifacts"
    __table_args__ = (Index(None, "sha256"),)

    version_id: Mapped[int] = mapped_column(
        ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True
    )
    kind: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64))


class EventRow(Base):
    """One thing that happened to a version, the `number`-th since it was uploaded."""

    __tablename__ = "events"

    version_id: Mapped[int] = mapped_column(
        ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    data: Mapped[Json] = mapped_column(_Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class BenchmarkRow(Base):
    """One measurement of a version; ids grow, so that the largest is the last."""

    __tablename__ = "benchmarks"
    __table_args__ = (Index(None, "version_id", "id"),)

    id: Mapped[int] = mapped_column(_Id, primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"))
    result: Mapped[Json] = mapped_column(_Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class ApiKeyRow(Base):
    """One API key: `digest` is the SHA-256 of it in hex, `scopes` are words between spaces."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
