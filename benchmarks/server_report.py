"""The server benchmark's report: a table for each kind of load, and what was promised of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import promises
from benchmarks.load import Outcome
from benchmarks.workload import Body

COLUMNS = (
    "server",
    "requests/s",
    "foldserve / it",
    "p50 ms",
    "p99 ms",
    "failed",
    "server CPU ms",
    "client CPU",
)


@dataclass(frozen=True)
class Cell:
    """One kind of load."""

    body: Body
    concurrency: int


@dataclass(frozen=True)
class Measured:
    """One measurement: which round, which load, which subject, what came of it."""

    round: int
    cell: Cell
    subject: str
    outcome: Outcome


def render(
    report: dict[str, Any], cells: list[Cell], measured: list[Measured], names: list[str]
) -> Iterator[str]:
    """The report as Markdown: what was measured where, then one table for each kind of load."""
    where = report["environment"]
    yield f"# {report['network']} under load\n"
    yield (
        f"{where['cpu']}, {where['cpus']} CPUs, {where['threads']} threads for every server; "
        f"Python {where['python']}; load average before: {where['load_average_before']}; "
        f"{where['when']}; {where['seconds']} s.  "
    )
    yield ", ".join(f"{name} {found}" for name, found in where["versions"].items()) + ".\n"
    yield "Medians over the rounds with the lowest and highest in brackets; ratios are of the same"
    yield "round. Server CPU is the time that all its processes spent for one answer; client CPU is"
    yield "the share of one core that the single client process used.\n"
    yield from (f"* {name}: {about}" for name, about in report["subjects"].items())
    yield from (f"* {name}: **not measured**: {why}" for name, why in report["missing"].items())
    for cell in cells:
        yield f"\n## {cell.body}, concurrency {cell.concurrency}\n"
        yield f"| {' | '.join(COLUMNS)} |"
        yield "|---" * len(COLUMNS) + "|"
        own = _of(measured, cell, promises.OWN)
        for name in names:
            outcomes = _of(measured, cell, name)
            if outcomes:
                yield _row(name, own, outcomes)
        yield from _against_bound(cell, measured)
    kept = [
        promise
        for cell in cells
        for promise in promises.of_server(
            report["network"], cell.body, cell.concurrency, _by_round(cell, measured)
        )
    ]
    yield from promises.lines(kept)


def _by_round(cell: Cell, measured: list[Measured]) -> list[promises.Round]:
    """The rounds in which this service was measured."""
    rounds: dict[int, dict[str, Outcome]] = {}
    for one in measured:
        if one.cell == cell:
            rounds.setdefault(one.round, {})[one.subject] = one.outcome
    return [
        promises.Round(
            {name: outcome.rate for name, outcome in outcomes.items()},
            outcomes[promises.OWN].p99,
        )
        for outcomes in rounds.values()
        if promises.OWN in outcomes
    ]


def _of(measured: list[Measured], cell: Cell, name: str) -> list[Outcome]:
    return [one.outcome for one in measured if one.cell == cell and one.subject == name]


def _row(name: str, own: list[Outcome], outcomes: list[Outcome]) -> str:
    rates = _spread([each.rate for each in outcomes])
    ratios = [mine.rate / max(each.rate, 1e-9) for mine, each in zip(own, outcomes, strict=True)]
    ratio = "" if name in (promises.OWN, promises.NOTHING) else _spread(ratios, 2)
    failed = sum(each.failed for each in outcomes)
    if name == "in-process":
        return f"| {name} | {rates} | {ratio} | | | | | |"
    p50, p99 = (
        _spread([getattr(each, key) * 1e3 for each in outcomes], 2) for key in ("p50", "p99")
    )
    cpu = statistics.median(each.client_cpu for each in outcomes)
    spent = statistics.median(each.server_cpu for each in outcomes) * 1e3
    cells = (name, rates, ratio, p50, p99, failed, f"{spent:.2f}" if spent else "", f"{cpu:.2f}")
    return f"| {' | '.join(map(str, cells))} |"


def _against_bound(cell: Cell, measured: list[Measured]) -> Iterator[str]:
    """p99 against the ideal: N callers at the in-process rate wait N / rate."""
    own, bound = _of(measured, cell, promises.OWN), _of(measured, cell, "in-process")
    if bound:
        ratios = [
            mine.p99 / (cell.concurrency / best.rate) for mine, best in zip(own, bound, strict=True)
        ]
        yield (
            f"\np99 over its ideal (concurrency / in-process rate, which is batch time times "
            f"queue depth): {_spread(ratios, 2)}"
        )


def _spread(values: list[float], digits: int | None = None) -> str:
    middle = statistics.median(values)
    places = digits if digits is not None else (0 if middle >= 100 else 1)
    low, high = f"{min(values):.{places}f}", f"{max(values):.{places}f}"
    return f"{middle:.{places}f} ({low} to {high})"
