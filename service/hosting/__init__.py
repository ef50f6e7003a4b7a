"""Versions of the catalog as loaded models: what may be asked for, loading, and keeping in step."""

from __future__ import annotations

from service.hosting.checks import check_calibration, check_changes, check_config, worker_limits
from service.hosting.host import Host
from service.hosting.hosted import Hosted
from service.hosting.loader import CALIBRATION

__all__ = [
    "CALIBRATION",
    "Host",
    "Hosted",
    "check_calibration",
    "check_changes",
    "check_config",
    "worker_limits",
]
