"""Opening the catalog's database: the engine, its transactions, and the migrations.

SQLite is set up to be as strict as a server database: write-ahead log, foreign keys on, every
commit synced, and writers take the write lock when they begin. (Left to itself SQLite takes it at
the first write, and a transaction that has read before then fails instead of waiting.)
"""

from __future__ import annotations

import json
import sqlite3
import time
from functools import partial
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.pool import ConnectionPoolEntry

SQLITE_BUSY_SECONDS = 30
"""How long a SQLite writer waits for the one before it."""

_AGAIN_SECONDS = 0.01
_POSTGRES = {"postgresql", "postgres"}
_WRITES = "foldserve_writes"
_MIGRATION_LOCK = 0x466F6C64  # any constant: names the PostgreSQL advisory lock


def open_engine(url: str) -> Engine:
    """An engine for `url` whose schema is brought up to date before it is returned.

    Any SQLAlchemy URL of SQLite (a file) or PostgreSQL (psycopg 3). Several processes may open
    the same database at once: one migrates, the others wait.
    """
    parsed = database_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite and parsed.database in (None, "", ":memory:"):
        raise ValueError("the catalog needs a database file: each connection sees its own :memory:")
    # Text is UTF-8 whatever the server's locale: psycopg gives bytes where that is SQL_ASCII.
    encoding = {} if sqlite else {"client_encoding": "utf8"}
    engine = create_engine(
        parsed, connect_args=encoding, pool_pre_ping=not sqlite, json_serializer=_json
    )
    if sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


def database_url(url: str) -> URL:
    """`url` parsed; a PostgreSQL URL that names no driver gets psycopg 3."""
    parsed = make_url(url)
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername in _POSTGRES else parsed


def writing(engine: Engine) -> Engine:
    """The same engine (and pool) for transactions that write."""
    return engine.execution_options(**{_WRITES: True})


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to `revision`, in one transaction, one process at a time."""
    with writing(engine).begin() as connection:
        if connection.dialect.name == "postgresql":
            lock = text("SELECT pg_advisory_xact_lock(:key)")
            connection.execute(lock, {"key": _MIGRATION_LOCK})
        command.upgrade(alembic_config(connection), revision)


def alembic_config(connection: Connection) -> Config:
    """Alembic's settings: the scripts in this package, run on `connection`."""
    config = Config()
    config.set_main_option("script_location", "service.store:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


# PostgreSQL and HTTP clients refuse NaN in JSON, so SQLite refuses it too.
_json = partial(json.dumps, allow_nan=False)


def _prepare_sqlite(connection: Any, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # BEGIN is ours, see _begin_sqlite
    connection.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_SECONDS * 1000}")
    _use_write_ahead_log(connection)
    # NORMAL may lose the last commits when the power fails.
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    _require_writable(connection)


def _use_write_ahead_log(connection: Any) -> None:
    """Turn the write-ahead log on, which several processes may want of a new file at once.

    Of those only one can; the others are told "locked" without the wait that `busy_timeout` asks
    for, because each holds what the other needs. So it is asked for again.
    """
    end = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > end:
                raise
        time.sleep(_AGAIN_SECONDS)


def _require_writable(connection: Any) -> None:
    """Refuse a connection that can only read.

    Where SQLite cannot open a file for writing (a passing fault, no descriptor left) it opens it
    for reading and says nothing: kept in the pool, such a connection would fail every writer that
    gets it, long after the fault. Only a write shows it; this one is never committed.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute("PRAGMA user_version = 0")
    finally:
        connection.execute("ROLLBACK")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
