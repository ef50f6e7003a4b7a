"""`foldserve keys`: make, list and revoke API keys, beside a running service or without one.

They work on the catalog that the settings name. A running service learns of a change within
FOLDSERVE_KEY_REFRESH_SECONDS.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from service.commands import show
from service.store import Catalog, KeyRecord, Scope

app = typer.Typer(
    help="Make, list and revoke API keys; a running service learns of it in seconds.",
    no_args_is_help=True,
)

_DataDir = Annotated[Path | None, typer.Option(help="Folder of the embedded store.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Whose or what for; shown in the list.")],
    scope: Annotated[
        list[Scope],
        typer.Option(
            help="read: look and download. predict: predictions. write: upload, change, delete, "
            "benchmark. May be repeated; none implies another."
        ),
    ],
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires.")] = None,
    data_dir: _DataDir = None,
    as_json: _Json = False,
) -> None:
    """Make a key and print it, this once."""
    expires = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with show.refusals(), _catalog(data_dir) as catalog:
        try:
            key, record = catalog.keys.create(name, scope, expires)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if as_json:
        show.as_json({"key": key, **_plain(record)})
        return
    typer.echo(key)
    show.err.print(
        f"Key {record.id} with {', '.join(sorted(record.scopes))}. It is not shown again.",
        style="dim",
        highlight=False,
    )


@app.command("list")
def list_keys(data_dir: _DataDir = None, as_json: _Json = False) -> None:
    """List every key, revoked ones too."""
    with show.refusals(), _catalog(data_dir) as catalog:
        records = catalog.keys.all()
    if as_json:
        show.as_json([_plain(record) for record in records])
        return
    table = Table("id", "name", "scopes", "created", "expires", "state")
    for record in records:
        table.add_row(
            record.id,
            record.name,
            " ".join(sorted(record.scopes)),
            _day(record.created_at),
            _day(record.expires_at),
            _state(record),
        )
    show.out.print(table if records else "No keys yet: foldserve keys create makes one.")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The id, as the list shows it.")],
    data_dir: _DataDir = None,
    as_json: _Json = False,
) -> None:
    """End a key for good."""
    with show.refusals(), _catalog(data_dir) as catalog:
        record = catalog.keys.revoke(key_id)
    if as_json:
        show.as_json(_plain(record))
    else:
        show.out.print(f"Key {record.id} ({record.name}) is revoked.", highlight=False)


@contextmanager
def _catalog(data_dir: Path | None) -> Iterator[Catalog]:
    """The catalog that a service with the same settings uses."""
    settings = show.settings(data_dir=data_dir)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    catalog = Catalog(settings.effective_database_url)
    try:
        yield catalog
    finally:
        catalog.close()


def _plain(record: KeyRecord) -> dict[str, Any]:
    return {
        "id": record.id,
        "name": record.name,
        "scopes": sorted(record.scopes),
        "created_at": record.created_at,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
        "state": _state(record),
    }


def _state(record: KeyRecord) -> str:
    if record.revoked_at is not None:
        return "revoked"
    return "usable" if record.usable(datetime.now(UTC)) else "expired"


def _day(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M}"
