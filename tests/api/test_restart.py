from __future__ import annotations

from service.api.restart import recent


def test_only_restarts_of_late_are_counted() -> None:
    assert recent("", 100.0, 10.0) == []
    assert recent("80.0,90.5,99.25", 100.0, 10.0) == [90.5, 99.25]
    assert recent("90.0,99.0", 100.0, 10.0) == [99.0], "the window's edge is outside"


def test_moments_of_another_boot_are_not_counted() -> None:
    assert recent("5000.0", 100.0, 600.0) == []
