"""Where uploads and results live: blobs by hash, and the catalog that gives them meaning."""

from __future__ import annotations

from service.store.blobs import BlobInfo, BlobRef, BlobStore, BlobWriter
from service.store.catalog import Catalog, sqlite_url
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

__all__ = [
    "BenchmarkRecord",
    "BlobInfo",
    "BlobRef",
    "BlobStore",
    "BlobWriter",
    "Catalog",
    "CheckpointRecord",
    "EventRecord",
    "KeyRecord",
    "ModelRecord",
    "Page",
    "Scope",
    "State",
    "VersionRecord",
    "check_model_name",
    "key_id",
    "sqlite_url",
]
