"""The chart of a benchmark: latency of both forms over batch sizes, on the terminal or as a PNG."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from service.errors import FormatNotInstalled

_WIDTH = 48
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FORMS = (("train", "training form", "dim"), ("deploy", "deploy form", "green"))


def bars(result: dict[str, Any]) -> Table:
    """Median latencies as bars on one scale, one for each form and batch size."""
    longest = max(row[form]["median_ms"] for row in result["batches"] for form, _, _ in _FORMS)
    table = Table.grid(padding=(0, 1))
    for row in result["batches"]:
        for number, (form, name, style) in enumerate(_FORMS):
            median = row[form]["median_ms"]
            batch = "" if number else f"batch {row['batch_size']}"
            bar = Text(_bar(median / longest), style)
            table.add_row(batch, name, bar, f"{median:.3g} ms")
    return table


def require_matplotlib() -> None:
    """Raises FormatNotInstalled where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise FormatNotInstalled(
            "Drawing a PNG needs matplotlib.", remedy="pip install 'foldserve[plot]'"
        )


def save(result: dict[str, Any], path: Path) -> None:
    """Draw medians over batch sizes with their quartiles into a PNG; matplotlib is needed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    sizes = [row["batch_size"] for row in result["batches"]]
    for form, name, colour in (
        ("train", "training form", "#8a8f98"),
        ("deploy", "deploy form", "#1a7f5a"),
    ):
        measured = [row[form] for row in result["batches"]]
        medians = [each["median_ms"] for each in measured]
        below = [each["median_ms"] - each["p25_ms"] for each in measured]
        above = [each["p75_ms"] - each["median_ms"] for each in measured]
        axes.errorbar(sizes, medians, (below, above), label=name, color=colour, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size (rows)")
    axes.set_ylabel("latency (ms), median and quartiles")
    where = ", ".join(str(result[key]) for key in ("device", "backend", "precision"))
    axes.set_title(f"{result['model']} version {result['version']}\n{where}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _bar(share: float) -> str:
    eighths = max(1, round(share * _WIDTH * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
