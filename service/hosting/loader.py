"""What the store holds of a version, read as the model set wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from service.errors import InvalidConfig
from service.graph import Program, load_program
from service.serving import Form, LoadOptions, Precision
from service.settings import Settings
from service.store import BlobStore, Catalog, VersionRecord

ARTIFACTS: Mapping[Form, str] = {"deploy": "deploy_program", "train": "train_program"}
"""Kinds of the artifacts that hold a version's programs."""

_PRECISIONS: Mapping[str, Precision] = {
    "auto": "float32",
    "float32": "float32",
    "tf32": "tf32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
}
CALIBRATION = "calibration"
"""Kind of the artifact that holds a version's calibration inputs."""

CALIBRATION_ROWS = 32
"""Fewest calibration inputs: half of them set ranges, and half certify the outcome."""

MOST_CALIBRATION_ROWS = 600
"""Calibration inputs that are used; more hardly change the outcome and make loading slow."""


class Loader:
    """Reads programs and calibration inputs, off the event loop, when they are wanted."""

    def __init__(self, settings: Settings, catalog: Catalog, blobs: BlobStore) -> None:
        self._settings, self._catalog, self._blobs = settings, catalog, blobs

    def reads(
        self, version: VersionRecord, files: Mapping[str, Path]
    ) -> dict[Form, Callable[[], Program]]:
        """How to read each form of a version from `files`, by kind, or else from the store.

        The training form is read again whenever it is first wanted, so that one always comes from
        the store: a conversion's files are gone by then.
        """
        model, number = version.model, version.version
        if files:
            reads: dict[Form, Callable[[], Program]] = {
                "deploy": partial(load_program, files[ARTIFACTS["deploy"]])
            }
        else:
            reads = {"deploy": partial(self._read, model, number, "deploy")}
        if ARTIFACTS["train"] in (files or version.artifacts):
            reads["train"] = partial(self._read, model, number, "train")
        return reads

    def options(self, version: VersionRecord) -> LoadOptions:
        """How a version asks to be run, with the settings where it is silent."""
        asked = version.config
        backend = asked.get("backend", "auto")
        blob = version.artifacts.get(CALIBRATION)
        calibration = None if blob is None else partial(self._calibration, blob)
        return LoadOptions(
            device=self._settings.device,
            backend=self._settings.backend if backend == "auto" else backend,
            precision=_PRECISIONS[asked.get("precision", "auto")],
            max_batch=self._settings.max_batch,
            calibration=calibration,
            max_bytes=self._settings.max_activation_bytes,
        )

    def _read(self, model: str, version: int, form: Form) -> Program:
        record = self._catalog.get_version(model, version)
        return load_program(self._blobs.open_path(record.artifacts[ARTIFACTS[form]]))

    def _calibration(self, blob: str) -> tuple[Tensor, ...]:
        """The uploaded calibration inputs [N, *input shape]. Raises InvalidConfig."""
        path = self._blobs.open_path(blob)
        try:  # mapped, so that a header cannot claim more than the file holds
            array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=4096)
        except (ValueError, OSError, EOFError) as error:
            raise InvalidConfig(
                f"`calibration` is not an npy array: {error}.", field="calibration"
            ) from None
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 2:
            raise InvalidConfig("`calibration` is no array of float32 rows.", field="calibration")
        if len(array) < CALIBRATION_ROWS:
            raise InvalidConfig(
                f"`calibration` has {len(array)} rows; {CALIBRATION_ROWS} or more are needed.",
                field="calibration",
            )
        rows = np.ascontiguousarray(array[:MOST_CALIBRATION_ROWS], dtype=np.float32)
        if not np.isfinite(rows).all():
            raise InvalidConfig(
                "`calibration` holds numbers that are not finite.", field="calibration"
            )
        return (torch.from_numpy(rows),)
