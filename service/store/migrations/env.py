"""Alembic runs this file; the connection comes from `service.store.database`."""

from __future__ import annotations

from alembic import context

from service.store.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=False,  # the caller's transaction holds everything
)
context.run_migrations()
