"""The one way in which the demo fails."""

from __future__ import annotations


class DemoFailed(Exception):
    """Something that the demo promises did not hold; the message says what."""


def check(holds: bool, complaint: str) -> None:
    """Raise DemoFailed with `complaint` unless `holds`."""
    if not holds:
        raise DemoFailed(complaint)
