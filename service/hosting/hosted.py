"""A version that is loaded, as a request sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, Self

from service.errors import QueueFull
from service.serving import Form, ModelSet, Prepared, Result, Rows, RowSpec
from service.store import VersionRecord


@dataclass(frozen=True)
class Hosted:
    """A loaded version, with what a request needs to know about it.

    `inputs` and `outputs` say name, shape and dtype of a row of each; `labels` has one name per
    class if the upload gave them; `preprocessing` is the config's object, or None for the defaults.
    """

    model: str
    version: int
    inputs: tuple[RowSpec, ...]
    outputs: tuple[RowSpec, ...]
    labels: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    models: ModelSet

    @classmethod
    def of(cls, version: VersionRecord, prepared: Prepared, models: ModelSet) -> Self:
        """A version of the catalog, as it was prepared in `models`."""
        return cls(
            model=version.model,
            version=version.version,
            inputs=prepared.inputs,
            outputs=prepared.outputs,
            labels=_labels(version),
            preprocessing=version.config.get("preprocessing"),
            models=models,
        )

    def described_by(self, version: VersionRecord) -> Self:
        """The same with the labels and the preprocessing of `version`."""
        return replace(
            self, labels=_labels(version), preprocessing=version.config.get("preprocessing")
        )

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one row of the first input, which is the only one of most networks."""
        return self.inputs[0].shape

    def takes_levels(self, form: Form) -> bool:
        """Whether images should come as grey levels: the device normalises them itself."""
        return self.models.takes_levels(self.model, self.version, form)

    def full(self, form: Form) -> QueueFull | None:
        """What one more row would be refused with: to know before a body is read for nothing."""
        return self.models.full(self.model, self.version, form)

    def expecting(self, form: Form, rows: int) -> contextlib.AbstractContextManager[None]:
        """Hold places in the queue for rows that are being decoded. Raises QueueFull."""
        return self.models.expecting(self.model, self.version, form, rows)

    def predict(self, rows: Rows, form: Form) -> Coroutine[Any, Any, Result]:
        """Outputs for rows, as `Batcher.submit` takes them. Raises what `ModelSet.predict` does."""
        # No coroutine of its own: one more for each request would do nothing but wait.
        return self.models.predict(self.model, rows, version=self.version, form=form)


def _labels(version: VersionRecord) -> tuple[str, ...] | None:
    labels = version.config.get("labels")
    return tuple(labels) if labels else None
