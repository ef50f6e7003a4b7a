"""An export made once for each version and kept as an artifact in the store."""

from __future__ import annotations

import shutil
import threading
import uuid
from pathlib import Path

import structlog

from service.checkpoint.child import ChildLimits
from service.errors import FormNotAvailable
from service.exports.files import FORMATS, export_file
from service.store import BlobStore, Catalog

log = structlog.get_logger(__name__)


def exported_artifact(
    catalog: Catalog,
    blobs: BlobStore,
    model: str,
    version: int,
    name: str,
    scratch: Path,
    limits: ChildLimits,
    cancel: threading.Event | None = None,
) -> str:
    """The sha256 of a ready version's deploy form in the format `name`, made if need be.

    `scratch` is a folder for the making; it need not exist. Raises FormNotAvailable for a version
    without a program, and what `export_file` raises.
    """
    kind = FORMATS[name]
    record = catalog.get_version(model, version)
    found = record.artifacts.get(kind.artifact)
    if found is not None:
        return found
    if "deploy_program" not in record.artifacts:
        raise FormNotAvailable(
            f"Version {version} has no program, so there is nothing to export to {name}.",
            remedy="Ask for safetensors or pth.",
        )
    folder = scratch / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        bundle = blobs.open_path(record.artifacts["deploy_program"])
        made = blobs.put_file(export_file(bundle, kind, folder, limits, cancel))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    catalog.add_artifact(model, version, kind.artifact, made.sha256, present=blobs.exists)
    log.info("exported", model=model, version=version, format=name, bytes=made.size)
    return made.sha256
