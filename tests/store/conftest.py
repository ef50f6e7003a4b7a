"""A fresh catalog for every test, on SQLite and on PostgreSQL where one is given."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from service.store import Catalog, sqlite_url


@contextmanager
def postgresql(options: str = "") -> Iterator[str]:
    """The URL of an empty PostgreSQL database, made with `options`; skips where there is none."""
    server = os.environ.get("TEST_POSTGRES_URL")
    if not server:
        pytest.skip("TEST_POSTGRES_URL names no PostgreSQL server to test on")
    name = f"foldserve_{uuid.uuid4().hex}"
    utf8 = {"client_encoding": "utf8"}  # a server made without a locale would answer in bytes
    engine = create_engine(server, isolation_level="AUTOCOMMIT", connect_args=utf8)
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} {options}"))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "catalog.sqlite")
        return
    with postgresql() as url:
        yield url


@pytest.fixture
def catalog(database_url: str) -> Iterator[Catalog]:
    """An empty, open catalog."""
    opened = Catalog(database_url)
    yield opened
    opened.close()
