"""Models named at the start: checkpoints that lie on this machine, as a mounted volume has them.

    foldserve serve --model repvgg-a0=/models/RepVGG-A0-train.pth

Each goes the way of an upload. A file whose bytes and config are those of the model's newest
version is not converted again, so a restart costs a hash and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog

from service.errors import BadInput, ModelNotFound
from service.hosting import check_config
from service.store import BlobStore, Catalog, VersionRecord, check_model_name

log = structlog.get_logger(__name__)

CONFIG_NAME = "config.json"
_SUFFIXES = (
    ".safetensors",
    ".pth",
    ".pt",
    ".pth.tar",
    ".bin",
    ".hdf5",
    ".h5",
    ".pt2",
    ".bundle",
)


@dataclass(frozen=True)
class Provision:
    """A model's name and its checkpoint, with the config that lies beside it ("" for none)."""

    model: str
    checkpoint: Path
    config: str = ""

    @classmethod
    def parse(cls, text: str) -> Provision:
        """`NAME=PATH`, where PATH is a file or a folder that holds exactly one checkpoint.

        A file `config.json` beside the checkpoint is the upload's config. Raises BadInput,
        NameInvalid or InvalidConfig, before anything is stored.
        """
        model, equals, path = text.partition("=")
        if not equals or not path:
            raise BadInput(f"{text!r} is no NAME=PATH.", remedy="Write --model repvgg-a0=FILE.")
        check_model_name(model)
        checkpoint = _checkpoint(Path(path))
        beside = checkpoint.parent / CONFIG_NAME
        config = beside.read_text() if beside.is_file() else ""
        check_config(config)
        return cls(model, checkpoint, config)


def provision(wanted: Provision, catalog: Catalog, blobs: BlobStore) -> VersionRecord:
    """Queue the checkpoint as the model's next version, or find it as the newest one.

    Reads the file once for its hash. Raises StoreError kinds.
    """
    blob = blobs.put_file(wanted.checkpoint)
    config = check_config(wanted.config)
    try:
        newest = catalog.list_versions(wanted.model, limit=1).items
    except ModelNotFound:
        newest = ()
    if newest and newest[0].checkpoint.sha256 == blob.sha256 and newest[0].config == config:
        version = newest[0]
    else:
        version = catalog.create_version(
            wanted.model, blob.sha256, blob.size, wanted.checkpoint.name, config
        )
    log.info("provisioned", model=version.model, version=version.version, state=version.state.value)
    return version


def _checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise BadInput(f"{path} does not exist.", remedy="Name a checkpoint, or its folder.")
    found = sorted(f for f in path.iterdir() if f.is_file() and f.name.endswith(_SUFFIXES))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise BadInput(
            f"{path} holds {len(found)} checkpoints ({names}); one is wanted.",
            remedy=f"Name the file. Checkpoints end in {', '.join(_SUFFIXES)}.",
        )
    return found[0]
