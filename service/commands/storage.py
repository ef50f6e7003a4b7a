"""Commands on the store itself, beside a running service or without one: `verify`, `gc`, `backup`.

They read the same settings as `serve`, so they look at the same catalog and blobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn

from service.commands import show
from service.errors import StoreError

if TYPE_CHECKING:
    from service.store import BlobStore, Catalog

_DataDir = Annotated[Path | None, typer.Option(help="Folder of the embedded store.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def verify(data_dir: _DataDir = None, as_json: _Json = False) -> None:
    """Read the whole store: every blob against its hash, blobs against the catalog.

    May run beside the service. Exit status 0 when everything that the catalog promises is there
    and whole, 1 when not or when the store cannot be read.
    """
    from service import store

    columns = (SpinnerColumn(), TextColumn("read"), DownloadColumn())
    with (
        show.refusals(),
        _opened(data_dir) as (catalog, blobs),
        Progress(*columns, console=show.err, transient=True, disable=as_json) as bars,
    ):
        task = bars.add_task("read", total=None)
        report = store.verify(catalog, blobs, lambda size: bars.advance(task, size))
    if as_json:
        show.as_json(report.to_dict())
    else:
        for problem in report.catalog_problems:
            show.err.print(f"[bold red]catalog[/] {problem}", highlight=False)
        for damage in report.damaged:
            show.err.print("[bold red]damaged[/]", damage.problem, highlight=False, soft_wrap=True)
            show.err.print("  needed by", ", ".join(damage.needed_by), highlight=False)
        show.out.print(
            f"{report.blobs} blobs, {report.bytes:,} bytes, {report.references} references, "
            f"{len(report.damaged)} damaged, {len(report.unreferenced)} unreferenced, "
            f"{report.temporary_files} temporary files",
            highlight=False,
            soft_wrap=True,
        )
    raise typer.Exit(0 if report.ok else 1)


def gc(
    data_dir: _DataDir = None,
    older_than: Annotated[
        float,
        typer.Option(help="Seconds since a blob was last put; younger ones stay.", min=0),
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: _Json = False,
) -> None:
    """Delete the blobs that no version needs any more. May run beside the service."""
    from service import store

    with show.refusals(), _opened(data_dir) as (catalog, blobs):
        done = store.collect(
            catalog, blobs, older_than=timedelta(seconds=older_than), dry_run=dry_run
        )
    if as_json:
        show.as_json(done.to_dict())
        return
    verb = "would be deleted" if dry_run else "deleted"
    show.out.print(
        f"{done.collected} blobs {verb}, {done.bytes:,} bytes; {done.young} too young",
        highlight=False,
    )


def backup(
    folder: Annotated[Path, typer.Argument(help="A data folder to make or bring up to date.")],
    data_dir: _DataDir = None,
    as_json: _Json = False,
) -> None:
    """Copy catalog and blobs to a folder that `serve --data-dir` can use. Beside the service."""
    from service import store

    with show.refusals(), _opened(data_dir) as (catalog, blobs):
        done = store.back_up(catalog, blobs, folder)
    if as_json:
        show.as_json(done.to_dict())
        return
    show.out.print(
        f"{folder}: {done.blobs} blobs, {done.copied} copied now, {done.bytes_copied:,} bytes",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _opened(data_dir: Path | None) -> Iterator[tuple[Catalog, BlobStore]]:
    """The store of the settings, which must be there already."""
    from service.store import BlobStore, Catalog

    settings = show.settings(data_dir=data_dir)
    if settings.database_url is None and not (settings.data_dir / "catalog.sqlite3").is_file():
        raise StoreError(
            f"There is no store in {settings.data_dir}.", remedy="Name its folder with --data-dir."
        )
    catalog = Catalog(settings.effective_database_url)
    try:
        yield catalog, BlobStore(settings.effective_blob_url, local_dir=settings.blob_cache_dir)
    finally:
        catalog.close()
