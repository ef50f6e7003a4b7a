"""Collecting blobs that no version needs, safely beside services that take uploads.

Only what was last put some time ago is looked at, because a blob is put before the row that needs
it is written. The catalog is asked again in a transaction that keeps new rows out, and the time is
compared again under the store's lock; `service.store.references` tells the other half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from service.store.blobs import BlobInfo, BlobStore
from service.store.catalog import Catalog
from service.store.schema import utc_now

_TOGETHER = 20
"""Blobs that one transaction looks at: while it runs, no version can be added."""


@dataclass(frozen=True)
class Collection:
    """What was collected (or would be), in blobs and bytes, and what was left as too young."""

    collected: int
    bytes: int
    young: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self)


def collect(
    catalog: Catalog, blobs: BlobStore, *, older_than: timedelta, dry_run: bool = False
) -> Collection:
    """Delete the blobs that no version needs and that were last put before `older_than` ago.

    What dead writers left is swept too.
    Raises StoreError when the catalog or the store cannot be reached; what is deleted until then
    was not needed.
    """
    limit = utc_now() - older_than
    if not dry_run:
        blobs.sweep_temporary()
    known = catalog.references()
    idle = [blob for blob in blobs.blobs() if blob.sha256 not in known]
    old = [blob for blob in idle if blob.modified < limit]
    gone: list[BlobInfo] = []
    for some in _in_groups(old):
        with catalog.needed(blob.sha256 for blob in some) as needed:
            free = [blob for blob in some if blob.sha256 not in needed]
            gone += [blob for blob in free if dry_run or blobs.collect(blob.sha256, limit)]
    return Collection(
        collected=len(gone),
        bytes=sum(blob.size for blob in gone),
        young=len(idle) - len(old),
        dry_run=dry_run,
    )


def _in_groups(blobs: list[BlobInfo]) -> Iterator[list[BlobInfo]]:
    for start in range(0, len(blobs), _TOGETHER):
        yield blobs[start : start + _TOGETHER]
