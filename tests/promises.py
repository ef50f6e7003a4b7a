"""The long form fits a budget, and what the tests measured is told in one table.

Every soak test names its share of `SOAK_SECONDS` (environment; default 1,800 s, thirty minutes):
`@pytest.mark.soak(share=0.1)` (0.02 when it says nothing). It is ended when the share is over, and
asks `budget` how long its own loop may go on. Shares that sum to more than 1 are scaled down, so
the sum of all is bounded.

A test that keeps a promise says so with `tell`. The rows come at the end of every long run, and of
any other run with `-s`; a row held if its test passed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

Tell = Callable[[str, str, str, str], None]
SECONDS = 1800.0
_SHARE = 0.02
_ALLOWED = pytest.StashKey[float]()
_OWN = 0.85
"""The part of its share that a test spends in its loop; the rest is for all around it."""


class Budget:
    """The time that one long test has for its loop, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left; negative when it is over."""
        return self._end - time.monotonic()


def total_seconds() -> float:
    """What all long tests may take together, in seconds."""
    return float(os.environ.get("SOAK_SECONDS", SECONDS))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Hold every long test to its share."""
    marks = {item: mark for item in session.items if (mark := item.get_closest_marker("soak"))}
    shares = {item: float(mark.kwargs.get("share", _SHARE)) for item, mark in marks.items()}
    whole = max(1.0, sum(shares.values()))
    for item, share in shares.items():
        item.stash[_ALLOWED] = share / whole * total_seconds()
        item.add_marker(pytest.mark.timeout(item.stash[_ALLOWED]))


@pytest.fixture
def budget(request: pytest.FixtureRequest) -> Budget:
    """The time of a long test."""
    return Budget(_OWN * request.node.stash[_ALLOWED])


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Adds a row: what is done, what is promised, what was measured, what the control showed."""

    def row(what: str, promised: str, measured: str, control: str) -> None:
        request.node.user_properties.append(("promise", (what, promised, measured, control)))

    return row


def table(reports: list[pytest.TestReport]) -> list[str]:
    """The rows of these reports as lines of a Markdown table; none where there are no rows."""
    rows = [
        [f"{row[0]}: {row[1]}", row[2], row[3], "yes" if report.passed else "NO"]
        for report in reports
        for name, row in report.user_properties
        if name == "promise"
    ]
    head = [["promise", "measured", "negative control", "held"], ["---"] * 4] if rows else []
    return [f"| {' | '.join(row)} |" for row in head + rows]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table."""
    if config.option.capture != "no" and config.option.markexpr != "soak":
        return
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if isinstance(report, pytest.TestReport) and report.when == "call"
    ]
    if lines := table(reports):
        terminalreporter.section("promises")
        for line in lines:
            terminalreporter.write_line(line)
