"""A process whose device is lost becomes a new one of the same command: same id, same arguments.

A container, or whoever watches over the process, sees no end of it. Restarts are counted across
processes, in the environment.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn

import structlog

from service.settings import PREFIX, Settings

log = structlog.get_logger("foldserve")

VARIABLE: Final = f"{PREFIX}RESTARTED_AT"
"""When the service started itself anew, as `time.monotonic` has it: other processes of the machine
see the same clock."""


def restart(
    settings: Settings, end_helpers: Callable[[], None], is_over: Callable[[], bool]
) -> NoReturn:
    """Replace this process, after nothing of it is served any more.

    Ends it with status 1 instead if it was replaced too often of late, and with 0 if it `is_over`:
    if somebody wants the end meanwhile. `end_helpers` ends the children of the process, which would
    otherwise be those of the next one.
    """
    now = time.monotonic()
    before = recent(os.environ.get(VARIABLE, ""), now, settings.restart_window_seconds)
    facts = {"restarts": len(before), "seconds": settings.restart_window_seconds}
    if len(before) >= settings.restart_limit:
        log.error("restarted too often", **facts, remedy="See why its device is lost each time.")
        leave(1)
    log.warning("restarting", **facts)
    end_helpers()
    if is_over():
        leave(0)
    _inherit_nothing()
    os.environ[VARIABLE] = ",".join(map(str, (*before, now)))
    _flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def recent(text: str, now: float, seconds: float) -> list[float]:
    """Of the moments in `text`, separated by commas, those of the last `seconds`."""
    moments = [float(moment) for moment in text.split(",") if moment]
    return [moment for moment in moments if now - seconds < moment <= now]


def leave(status: int) -> NoReturn:
    """End the process at once: an orderly end frees what lies on the lost device, and aborts."""
    _flush()
    os._exit(status)


def _inherit_nothing() -> None:
    """What Python opens is closed by exec anyway; what a device's driver opened may not be."""
    for name in os.listdir("/dev/fd"):
        if (descriptor := int(name)) > 2:
            try:
                os.set_inheritable(descriptor, False)
            except OSError:  # that of the listing itself
                continue


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
