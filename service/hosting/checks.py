"""What an upload may ask for, checked before anything is converted; and the worker's limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from service.checkpoint import ReadLimits
from service.checkpoint.child import ChildLimits
from service.errors import InvalidConfig
from service.networks import ModelConfig, parse_changes
from service.serving import backend_names, can_quantise
from service.settings import Settings
from service.worker import WorkerLimits


def check_config(text: str | bytes) -> dict[str, Any]:
    """The config of an upload, checked as far as it can be before the file is read.

    Returns it as a JSON object with every default filled in. Raises InvalidConfig.
    """
    config = ModelConfig.from_json(text)
    if config.backend not in ("auto", *backend_names()):
        raise InvalidConfig(
            f"`backend` is {config.backend!r}, which is not available here.",
            remedy=f"Use one of auto, {', '.join(backend_names())}.",
            field="backend",
        )
    if config.precision == "int8" and not can_quantise():
        raise InvalidConfig(
            "`precision` is int8, which is not available here.",
            remedy="Install foldserve[int8], or use float32 or bfloat16.",
            field="precision",
        )
    checked: dict[str, Any] = json.loads(config.to_json())
    return checked


def check_changes(text: bytes) -> dict[str, Any]:
    """The fields of a config that `text` changes, checked and filled in. Raises InvalidConfig."""
    changed = parse_changes(text)
    checked: dict[str, Any] = json.loads(changed.to_json())
    return {field: checked[field] for field in json.loads(text)}


def check_calibration(config: Mapping[str, Any], given: bool) -> None:
    """Raises InvalidConfig when a config asks for int8 and no calibration inputs came with it."""
    if config["precision"] == "int8" and not given:
        raise InvalidConfig(
            "`precision` is int8, and no inputs to calibrate it were sent.",
            remedy="Send 64 or more typical inputs as the part `calibration`: one npy array "
            "[N, *input shape], preprocessed as the network takes it.",
            field="precision",
        )


def worker_limits(settings: Settings) -> WorkerLimits:
    """The worker's limits as the settings say."""
    prefix = "reader_"
    reader = {
        name.removeprefix(prefix): getattr(settings, name)
        for name in Settings.model_fields
        if name.startswith(prefix)
    }
    return WorkerLimits(
        poll_seconds=settings.conversion_poll_seconds,
        attempts=settings.conversion_attempts,
        stale_seconds=settings.conversion_stale_seconds,
        read=ReadLimits(file_bytes=settings.max_upload_bytes, **reader),
        child=ChildLimits(
            seconds=settings.conversion_seconds,
            cpu_seconds=math.ceil(settings.conversion_seconds * (settings.conversion_threads + 1)),
            memory_bytes=settings.conversion_memory_bytes,
            file_bytes=2 * settings.max_upload_bytes + (1 << 30),
            threads=settings.conversion_threads,
            nice=0 if settings.conversion_priority == "normal" else 19,
            idle=settings.conversion_priority == "idle",
            scratch_bytes=4 * settings.max_upload_bytes + (2 << 30),
        ),
    )
