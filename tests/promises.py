"""The long form fits a budget, and what the tests measured is told in one table.

Every soak test names its share of `SOAK_SECONDS` (environment; default 1,800 s, thirty minutes):
`@pytest.mark.soak(share=0.1)` (0.02 when it says nothing). It is ended when the share is over, and
asks `budget` how long its own loop may go on. Shares that sum to more than 1 are scaled down, so
the sum of all is bounded. What a test leaves of its share falls to those that come after it.

A test that keeps a promise says so with `tell`. The rows come at the end of every long run, and of
any other run with `-s`; a row held if its test passed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

Tell = Callable[[str, str, str, str], None]
SECONDS = 1800.0
_SHARE = 0.02
_ALLOWED = pytest.StashKey[float]()
_SHARES = pytest.StashKey["Shares"]()
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


class Shares:
    """How the time is divided among the tests that have begun or are yet to begin."""

    def __init__(self, shares: dict[str, float], seconds: float) -> None:
        self._shares = dict(shares)
        self._rest = max(1.0, sum(shares.values()))
        self._seconds = seconds
        self._began: float | None = None

    def begin(self, name: str) -> float:
        """The seconds of the test that begins now: its part of what is left."""
        now = time.monotonic()
        if self._began is None:
            self._began = now
        share, rest = self._shares.pop(name, _SHARE), self._rest
        self._rest -= share
        return max(1.0, share / max(rest, share) * (self._seconds - (now - self._began)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Divide the time."""
    marks = {item: mark for item in session.items if (mark := item.get_closest_marker("soak"))}
    shares = {item.nodeid: float(mark.kwargs.get("share", _SHARE)) for item, mark in marks.items()}
    session.config.stash[_SHARES] = Shares(shares, total_seconds())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold a long test to its share; before the plugin that ends it looks how long it may take."""
    if item.get_closest_marker("soak"):
        item.stash[_ALLOWED] = item.config.stash[_SHARES].begin(item.nodeid)
        item.add_marker(pytest.mark.timeout(item.stash[_ALLOWED]))
    return (yield)


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
