from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.promises import Budget, Shares, table
from tests.running import ROOT

pytest_plugins = ["pytester"]

SUITE = """
import pytest
pytest_plugins = ["tests.promises"]

@pytest.mark.soak(share={share})
def test_long(budget, tell):
    tell("a thing", "at most 1", str(budget.seconds), "2 is seen")

@pytest.mark.soak(share=0.5)
def test_broken(tell):
    tell("another", "at most 1", "2", "3 is seen")
    raise AssertionError
"""


def _run(pytester: pytest.Pytester, share: float) -> pytest.RunResult:
    pytester.makeini(f"[pytest]\nmarkers = soak: long\npythonpath = {ROOT}\n")
    pytester.makepyfile(SUITE.format(share=share))
    return pytester.runpytest_subprocess("-m", "soak", "-p", "timeout")


def test_every_promise_gets_a_row(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOAK_SECONDS", "100")
    result = _run(pytester, 0.2)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "| promise | measured | negative control | held |",
            "| a thing: at most 1 | 17.0* | 2 is seen | yes |",
            "| another: at most 1 | 2 | 3 is seen | NO |",
        ]
    )


def test_shares_that_sum_to_more_than_the_whole_are_scaled_down(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOAK_SECONDS", "100")
    result = _run(pytester, 1.5)
    result.stdout.fnmatch_lines(["| a thing: at most 1 | 63.75 | 2 is seen | yes |"])


def test_what_a_test_leaves_falls_to_those_after_it() -> None:
    shares = Shares({"first": 0.5, "second": 0.25, "third": 0.25}, 100)
    assert shares.begin("first") == pytest.approx(50, abs=0.1)
    assert shares.begin("second") == pytest.approx(50, abs=0.1)  # nothing was spent
    assert shares.begin("third") == pytest.approx(100, abs=0.1)
    # The control: where the time is spent, no more than the rest is given out.
    spent = Shares({"first": 1.5, "second": 0.5}, 0)
    assert spent.begin("first") == spent.begin("second") == 1


def test_no_rows_make_no_table() -> None:
    report: Any = SimpleNamespace(user_properties=[("other", 1)], passed=True)
    assert table([report]) == []


def test_a_budget_runs_out() -> None:
    assert 0 < Budget(100).left <= 100
    assert Budget(0).left <= 0
