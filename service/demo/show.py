"""How the demo shows its results: rich tables of what the service answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from service.client import Label

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """One form's answers on the held-out split: how many rows, and how many were right."""

    form: str
    rows: int
    right: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """Share of the rows that were answered right, 0 to 1."""
        return self.right / self.rows


def certificate(version: Json) -> Table:
    """The certificate of one version: what was fused, what it saves, and how equal it is."""
    fusion = version["fusion"]
    table = _table(
        f"Certificate: {version['model']} version {version['version']}, "
        f"{version['architecture']['name']}",
        "",
        "training form",
        "deploy form",
        "saved",
    )
    for title, name in (
        ("convolutions", "convolutions"),
        ("multiply-accumulates an image", "macs"),
        ("parameters", "parameters"),
        ("bytes of weights", "bytes"),
    ):
        before, after = fusion[f"{name}_before"], fusion[f"{name}_after"]
        table.add_row(title, f"{before:,}", f"{after:,}", f"{1 - after / before:.0%}")
    table.add_section()
    blocks = f"{fusion['fused']} of {fusion['blocks']}"
    table.add_row("blocks fused", blocks, f"{fusion['kept']} kept", f"{fusion['refused']} refused")
    table.add_row("largest float64 error of a block", f"{fusion['error_float64']:.1e}", "", "")
    table.add_row("float32 error / output variation", f"{fusion['error_end_to_end']:.1e}", "", "")
    return table


def side_by_side(title: str, judged: Sequence[Judged], same: int, apart: float) -> Table:
    """Both forms' accuracy on the held-out split, and how far their answers are apart."""
    table = _table(title, "", *(f"{each.form} form" for each in judged))
    table.add_row("images", *(str(each.rows) for each in judged))
    table.add_row("named rightly", *(str(each.right) for each in judged))
    table.add_row("accuracy", *(f"{each.accuracy:.2%}" for each in judged))
    table.add_row("time over HTTP", *(f"{each.seconds:.2f} s" for each in judged))
    table.add_section()
    table.add_row("same prediction", f"{same} of {judged[0].rows}", "")
    table.add_row("largest difference of a logit", f"{apart:.1e}", "")
    return table


def classes(deploy: Sequence[Label], train: Sequence[Label]) -> Table:
    """The best classes of a posted image; both forms name the same ones in the same order."""
    table = _table("The posted JPEG", "class", "score, deploy form", "score, training form")
    for ours, theirs in zip(deploy, train, strict=True):
        table.add_row(ours.label, f"{ours.score:.5f}", f"{theirs.score:.5f}")
    return table


def benchmark(answer: Json) -> Table:
    """Training form against deploy form, per batch size."""
    table = _table(
        f"Latency of {answer['model']}, {answer['device']}, {answer['precision']}, "
        f"{answer['seconds']:.0f} s measured",
        "batch",
        "train",
        "deploy",
        "speed-up",
        "95 % interval",
        "saved",
        "control",
    )
    for batch in answer["batches"]:
        low, high = (batch["speedup_interval"][end] for end in ("low", "high"))
        saving = batch["saving_percent"]
        table.add_row(
            str(batch["batch_size"]),
            f"{batch['train']['median_ms']:.2f} ms",
            f"{batch['deploy']['median_ms']:.2f} ms",
            f"{batch['speedup']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{saving:.0f} %" if saving is not None else "no claim",
            f"{batch['control']['ratio']:.3f}",
        )
    table.caption = "\n".join(batch["statement"] for batch in answer["batches"])
    table.caption_justify = "left"
    return table


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
