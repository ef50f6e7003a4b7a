"""Serving: execution backends, the batcher, and the set of loaded models."""

from service.serving.backends import Backend, Description, Precision, Prepared
from service.serving.batcher import Batcher, BatcherStats, BatchLimits
from service.serving.device import DeviceThread, available_cpus
from service.serving.request import Result, Timing

__all__ = [
    "Backend",
    "BatchLimits",
    "Batcher",
    "BatcherStats",
    "Description",
    "DeviceThread",
    "Precision",
    "Prepared",
    "Result",
    "Timing",
    "available_cpus",
]
