"""A backup that can be served: the catalog first, then every blob that it names.

In this order it is consistent while the service runs: blobs never change, and what is added later
is not in the copy of the catalog. The copy is laid out as a data folder.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.errors import BlobCorrupt, StoreError
from service.store.blobs import BlobStore
from service.store.catalog import Catalog, sqlite_url
from service.store.files import fsync_folder, make_folder

CATALOG_NAME = "catalog.sqlite3"
BLOBS_NAME = "blobs"
_ATTEMPTS = 3


@dataclass(frozen=True)
class Backup:
    """What a backup holds: versions and blobs in it, and how many blobs this run copied."""

    blobs: int
    copied: int
    bytes_copied: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def back_up(catalog: Catalog, blobs: BlobStore, folder: Path) -> Backup:
    """Bring `folder` up to date: a copy of the catalog and of all blobs it needs, each checked.

    Blobs that are there and whole are not copied again, and those that are not needed any more
    stay. Raises BlobCorrupt for a blob that is damaged here and there, StorageFull, and StoreError
    when the catalog is not SQLite.
    """
    make_folder(folder)
    target = BlobStore(folder / BLOBS_NAME)
    for attempt in range(_ATTEMPTS):
        new = folder / f"{CATALOG_NAME}.new"
        new.unlink(missing_ok=True)
        catalog.copy_to(new)
        try:
            copy = Catalog(sqlite_url(new))
            try:
                needed = copy.references()
            finally:
                copy.close()
            copied = [_copy(sha256, blobs, target) for sha256 in sorted(needed)]
        except BlobCorrupt:
            # Perhaps its version was deleted since and the blob collected: then look again.
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        _put_in_place(new, folder / CATALOG_NAME)
        sizes = [size for size in copied if size is not None]
        return Backup(len(needed), len(sizes), sum(sizes))
    raise StoreError("The backup was not finished.")


def _copy(sha256: str, source: BlobStore, target: BlobStore) -> int | None:
    """Copy a blob unless it is there and whole; the bytes copied, or None."""
    if target.exists(sha256):
        try:
            target.verify(sha256)
            return None
        except BlobCorrupt:
            pass
    with target.writer() as writer:
        for chunk in source.read_chunks(sha256):
            writer.write(chunk)
        try:
            return writer.commit(expected_sha256=sha256).size
        except BlobCorrupt:
            source.verify(sha256)  # says which one it is
            raise


def _put_in_place(new: Path, final: Path) -> None:
    # If somebody served the backup, its log belongs to the catalog that goes now.
    for leftover in (f"{final}-wal", f"{final}-shm"):
        Path(leftover).unlink(missing_ok=True)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(new, final)
    fsync_folder(final.parent)
