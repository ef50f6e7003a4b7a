"""How the commands talk: tables and colours for people, JSON for programs, problems with remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.errors import FoldserveError
from service.settings import Settings, explain

PARTIAL = (
    "The file holds known blocks of a network, but not how they are wired: the deploy checkpoint "
    "is for the project's own code, and cannot be served. For that, pack the whole network where "
    "its code is: `foldserve pack --help`."
)
"""Said of what `service.partial` converts."""

out = Console()
err = Console(stderr=True)


def as_json(value: Any) -> None:
    """Print a value for programs."""
    typer.echo(json.dumps(value, indent=2, default=str))


def settings(**given: Any) -> Settings:
    """The settings, options that are not None before the environment; exit status 2 if wrong."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for line in explain(error):
            err.print("[red]error[/red]:", line, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def refusals() -> Iterator[None]:
    """Turn refusals into words on stderr and exit status 1."""
    try:
        yield
    except FoldserveError as error:
        err.print(f"[bold red]{error.title}[/] ({error.code()})", highlight=False)
        err.print(error.detail, highlight=False, markup=False)
        err.print(error.remedy, style="dim", highlight=False, markup=False)
        raise typer.Exit(1) from None
    except httpx.TransportError as error:
        err.print(f"[bold red]No service answers[/]: {error}", highlight=False)
        err.print("Start one with `foldserve serve`, or name it with --url.", style="dim")
        raise typer.Exit(1) from None
    except OSError as error:
        err.print(f"[bold red]{error.strerror}[/]: {error.filename}", highlight=False)
        raise typer.Exit(1) from None


def certificate(architecture: dict[str, Any], fusion: dict[str, Any], title: str) -> None:
    """What a conversion found and proved, and what it took for granted."""
    table = Table(title=title, title_justify="left", show_header=True, header_style="dim")
    table.add_column("")
    table.add_column("training form", justify="right")
    table.add_column("deploy form", justify="right")
    for name, key in (
        ("convolutions", "convolutions"),
        ("multiply-accumulates", "macs"),
        ("parameters", "parameters"),
        ("bytes of weights", "bytes"),
    ):
        if f"{key}_before" in fusion:
            table.add_row(name, f"{fusion[f'{key}_before']:,}", f"{fusion[f'{key}_after']:,}")
    extents = architecture["input_shape"]
    shape = f", input {' x '.join(map(str, extents))}" if extents else ""
    out.print(f"[bold]{architecture['name']}[/] ({architecture['family']}){shape}")
    out.print(table)
    out.print(
        f"{fusion['fused']} of {fusion['blocks']} blocks fused, {fusion['kept']} kept, "
        f"{fusion['refused']} refused"
    )
    out.print(
        f"error {_small(fusion['error_float64'])} in float64, "
        f"{_small(fusion['error_end_to_end'])} as served, relative to the output's variation",
        highlight=False,
    )
    for sentence in architecture.get("assumed", ()):
        out.print(f"[dim]assumed[/] {escape(sentence)}", highlight=False)
    if extents is None:
        out.print(PARTIAL, highlight=False)


def benchmark(result: dict[str, Any]) -> None:
    """The table of a measurement."""
    runs = ", ".join(str(result[k]) for k in ("device", "backend", "precision") if result.get(k))
    table = Table(title=f"{result['model']} version {result['version']}: {runs}")
    for name in ("batch", "training form", "deploy form", "speed-up", "interval", "control"):
        table.add_column(name, justify="right")
    for row in result["batches"]:
        interval = row["speedup_interval"]
        table.add_row(
            str(row["batch_size"]),
            f"{row['train']['median_ms']:.3g} ms",
            f"{row['deploy']['median_ms']:.3g} ms",
            f"{row['speedup']:.2f}",
            f"{interval['low']:.2f} to {interval['high']:.2f}",
            f"{row['control']['ratio']:.3f}",
        )
    out.print(table)
    for row in result["batches"]:
        out.print(row["statement"], highlight=False)


def _small(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1e}"
