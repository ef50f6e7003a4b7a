"""Dataclasses as JSON values, which have no infinity and no NaN."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def jsonable(value: DataclassInstance) -> dict[str, Any]:
    """The fields by name; a number that is not finite becomes None."""
    fields: dict[str, Any] = _finite(asdict(value))
    return fields


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
