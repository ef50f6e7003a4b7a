"""Models, versions, artifacts, events and benchmarks.

Revision: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None

_id = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_time = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables of models, versions, artifacts, events and benchmarks."""
    op.create_table(
        "models",
        sa.Column("id", _id, nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("default_version", sa.Integer),
        sa.Column("default_pinned", sa.Boolean, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_models"),
        sa.UniqueConstraint("name", name="uq_models_name"),
    )
    op.create_table(
        "versions",
        sa.Column("id", _id, nullable=False),
        sa.Column("model_id", _id, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("servable", sa.Boolean, nullable=False),
        sa.Column("checkpoint_sha256", sa.String(64), nullable=False),
        sa.Column("checkpoint_bytes", sa.BigInteger, nullable=False),
        sa.Column("checkpoint_filename", sa.String(255)),
        sa.Column("checkpoint_form", sa.String(16)),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("architecture", sa.JSON),
        sa.Column("fusion", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("progress", sa.JSON),
        sa.Column("last_event", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("worker", sa.String(128)),
        sa.Column("created_at", _time, nullable=False),
        sa.Column("updated_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_versions"),
        sa.ForeignKeyConstraint(
            ["model_id"], ["models.id"], name="fk_versions_model_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("model_id", "number", name="uq_versions_model_id_number"),
    )
    op.create_index("ix_versions_state_id", "versions", ["state", "id"])
    op.create_index("ix_versions_checkpoint_sha256", "versions", ["checkpoint_sha256"])
    op.create_table(
        "artifacts",
        sa.Column("version_id", _id, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("version_id", "kind", name="pk_artifacts"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_artifacts_version_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_artifacts_sha256", "artifacts", ["sha256"])
    op.create_table(
        "events",
        sa.Column("version_id", _id, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("version_id", "number", name="pk_events"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_events_version_id", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "benchmarks",
        sa.Column("id", _id, nullable=False),
        sa.Column("version_id", _id, nullable=False),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("created_at", _time, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_benchmarks"),
        sa.ForeignKeyConstraint(
            ["version_id"], ["versions.id"], name="fk_benchmarks_version_id", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_benchmarks_version_id_id", "benchmarks", ["version_id", "id"])


def downgrade() -> None:
    """Drop them with all that they hold."""
    for table in ("benchmarks", "events", "artifacts", "versions", "models"):
        op.drop_table(table)
