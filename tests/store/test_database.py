"""Opening a database: migrations, their agreement with the tables, SQLite's settings."""

from __future__ import annotations

import multiprocessing
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, event, inspect, text
from sqlalchemy.exc import OperationalError

from service.errors import StoreError
from service.store import Catalog, Scope, database, sqlite_url
from service.store.database import alembic_config, database_url, migrate, open_engine, writing
from service.store.schema import Base
from tests.store.conftest import postgresql


def differences(url: str, metadata: MetaData) -> list[object]:
    engine = open_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found: list[object] = compare_metadata(context, metadata)
    engine.dispose()
    return found


def test_migrations_and_tables_agree(database_url: str) -> None:
    assert differences(database_url, Base.metadata) == []


def test_a_forgotten_migration_would_show(database_url: str) -> None:
    changed = MetaData()
    for table in Base.metadata.tables.values():
        table.to_metadata(changed)
    changed.tables["models"].append_column(Column("forgotten", Integer))
    assert len(differences(database_url, changed)) == 1


def test_migrating_again_changes_nothing_and_down_leaves_nothing(database_url: str) -> None:
    engine = open_engine(database_url)
    migrate(engine)
    with writing(engine).begin() as connection:
        command.downgrade(alembic_config(connection), "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrate(engine)
    assert "versions" in inspect(engine).get_table_names()
    engine.dispose()


def test_several_processes_open_a_new_database_at_once(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "catalog.sqlite")
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=_open, args=(url, f"m{i}")) for i in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    catalog = Catalog(url)
    assert [model.name for model in catalog.list_models().items] == ["m0", "m1", "m2"]
    catalog.close()


class Refusing:
    """A connection that refuses the write-ahead log with each of these codes, then takes it."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)

    def execute(self, statement: str) -> None:
        assert statement == "PRAGMA journal_mode = WAL"
        if self.codes:
            error = sqlite3.OperationalError("refused")
            error.sqlite_errorcode = self.codes.pop(0)
            raise error


def test_whoever_else_turns_the_write_ahead_log_on_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = Refusing(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_RECOVERY)
    database._use_write_ahead_log(busy)
    assert not busy.codes
    with pytest.raises(sqlite3.OperationalError):
        database._use_write_ahead_log(Refusing(sqlite3.SQLITE_IOERR))
    monkeypatch.setattr(database, "SQLITE_BUSY_SECONDS", -1)
    with pytest.raises(sqlite3.OperationalError):
        database._use_write_ahead_log(Refusing(sqlite3.SQLITE_BUSY))


def _open(url: str, model: str) -> None:
    catalog = Catalog(url)
    catalog.create_version(model, "0" * 64, 1, None, {})
    catalog.close()


def test_sqlite_is_durable_and_checks_references(tmp_path: Path) -> None:
    engine = open_engine(sqlite_url(tmp_path / "catalog.sqlite"))
    with engine.connect() as connection:
        read = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    assert read == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 30_000,
    }


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgres://db/foldserve", "postgresql+psycopg"),
        ("postgresql://db/foldserve", "postgresql+psycopg"),
        ("postgresql+psycopg://db/foldserve", "postgresql+psycopg"),
        ("sqlite:////data/catalog.sqlite", "sqlite"),
    ],
)
def test_postgresql_is_spoken_to_through_psycopg(url: str, driver: str) -> None:
    assert database_url(url).drivername == driver


def test_a_private_memory_database_is_refused() -> None:
    with pytest.raises(ValueError, match="database file"):
        Catalog("sqlite://")


def test_a_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="not a database"):
        Catalog(sqlite_url(path))


def test_a_connection_that_can_only_read_is_not_kept(tmp_path: Path) -> None:
    """SQLite falls back to reading where a file cannot be opened for writing just then."""
    file = tmp_path / "catalog.sqlite"
    engine = open_engine(sqlite_url(file))
    engine.dispose()  # the next connection is a new one

    def for_reading(*_: object) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{file}?mode=ro", uri=True, check_same_thread=False)

    event.listen(engine, "do_connect", for_reading)
    with pytest.raises(OperationalError, match="readonly"):
        write_nothing(engine)
    event.remove(engine, "do_connect", for_reading)
    write_nothing(engine)  # the control: the same engine writes again
    engine.dispose()


def write_nothing(engine: Engine) -> None:
    with writing(engine).begin() as connection:
        connection.execute(text("DELETE FROM models WHERE 1 = 0"))


def test_text_is_text_whatever_a_servers_locale() -> None:
    bare = "TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
    with postgresql(bare) as url:
        catalog = Catalog(url)
        catalog.keys.create("ключ", [Scope.READ])
        assert [key.name for key in catalog.keys.all()] == ["ключ"]
        catalog.close()
