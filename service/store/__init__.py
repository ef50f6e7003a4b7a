"""Where uploads and results live: blobs by hash, and the catalog that gives them meaning."""

from __future__ import annotations

from service.store.backup import Backup, back_up
from service.store.blobs import BlobInfo, BlobRef, BlobStore, BlobWriter
from service.store.catalog import Catalog, sqlite_url
from service.store.collect import Collection, collect
from service.store.keys import KeyRecord, Scope, key_id
from service.store.names import check_model_name
from service.store.records import (
    BenchmarkRecord,
    CheckpointRecord,
    EventRecord,
    ModelRecord,
    Page,
    State,
    VersionRecord,
)
from service.store.verify import Damage, StoreReport, verify

__all__ = [
    "Backup",
    "BenchmarkRecord",
    "BlobInfo",
    "BlobRef",
    "BlobStore",
    "BlobWriter",
    "Catalog",
    "CheckpointRecord",
    "Collection",
    "Damage",
    "EventRecord",
    "KeyRecord",
    "ModelRecord",
    "Page",
    "Scope",
    "State",
    "StoreReport",
    "VersionRecord",
    "back_up",
    "check_model_name",
    "collect",
    "key_id",
    "sqlite_url",
    "verify",
]
