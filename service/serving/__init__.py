"""Serving: execution backends, the batcher, and the set of loaded models."""

from service.serving.backends import (
    Backend,
    BatchPart,
    Choices,
    Description,
    Levels,
    Precision,
    Prepared,
    RowSpec,
    backend_named,
    backend_names,
    can_quantise,
    powers_of_two,
    random_rows,
)
from service.serving.batcher import Batcher
from service.serving.columns import as_tensor, too_many
from service.serving.device import Device, available_cpus
from service.serving.models import ModelSet, ModelSetLimits
from service.serving.request import Result, Rows, Timing
from service.serving.runner import Form, LoadedModel, LoadOptions, ModelKey
from service.serving.stats import BatcherStats, BatchLimits
from service.serving.tally import Tallied, Tally

__all__ = [
    "Backend",
    "BatchLimits",
    "BatchPart",
    "Batcher",
    "BatcherStats",
    "Choices",
    "Description",
    "Device",
    "Form",
    "Levels",
    "LoadOptions",
    "LoadedModel",
    "ModelKey",
    "ModelSet",
    "ModelSetLimits",
    "Precision",
    "Prepared",
    "Result",
    "RowSpec",
    "Rows",
    "Tallied",
    "Tally",
    "Timing",
    "as_tensor",
    "available_cpus",
    "backend_named",
    "backend_names",
    "can_quantise",
    "powers_of_two",
    "random_rows",
    "too_many",
]
