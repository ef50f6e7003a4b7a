"""Checking a whole store: every blob against its hash, and blobs against the catalog."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from service.errors import BlobCorrupt
from service.store.blobs import BlobStore
from service.store.catalog import Catalog


@dataclass(frozen=True)
class Damage:
    """A blob that is needed and not whole: what is wrong, and which versions need it."""

    sha256: str
    problem: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True)
class StoreReport:
    """What `verify` found.

    `damaged` blobs are needed by versions; `spoilt` ones are damaged and needed by none.
    `unreferenced` blobs are no fault: uploads under way, and what `collect` will take.
    """

    blobs: int
    bytes: int
    references: int
    catalog_problems: tuple[str, ...]
    damaged: tuple[Damage, ...]
    spoilt: tuple[str, ...]
    unreferenced: tuple[str, ...]
    temporary_files: int

    @property
    def ok(self) -> bool:
        """Whether everything that the catalog promises is there and whole."""
        return not self.damaged and not self.catalog_problems

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"ok": self.ok} | asdict(self)


def verify(
    catalog: Catalog, blobs: BlobStore, progress: Callable[[int], None] = lambda _: None
) -> StoreReport:
    """Read every blob and compare; may run beside a service. `progress` is told the bytes read.

    Raises StoreError when catalog or store cannot be read at all.
    """
    problems = catalog.integrity_problems()
    found = {blob.sha256: blob for blob in blobs.blobs()}
    wrong: dict[str, str] = {}
    for sha256 in sorted(found.keys() | catalog.references()):
        try:
            blobs.verify(sha256)
        except BlobCorrupt as error:
            wrong[sha256] = error.detail
        progress(found[sha256].size if sha256 in found else 0)
    needed = catalog.references()  # again: versions may have come and gone meanwhile
    late = needed.keys() - found.keys()
    return StoreReport(
        blobs=len(found),
        bytes=sum(blob.size for blob in found.values()),
        references=sum(map(len, needed.values())),
        catalog_problems=problems,
        damaged=tuple(
            Damage(sha256, sentence, needed[sha256])
            for sha256, sentence in wrong.items()
            if sha256 in needed and not (sha256 in late and blobs.exists(sha256))
        ),
        spoilt=tuple(sha256 for sha256 in wrong if sha256 not in needed and sha256 in found),
        unreferenced=tuple(sorted(found.keys() - needed.keys())),
        temporary_files=blobs.temporary_files(),
    )
