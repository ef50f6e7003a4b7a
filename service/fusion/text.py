"""The fusion report for people: what was fused, kept and refused, why, and by which rules."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

WIDTH = 100
_STATUS = {
    "fused": "Fused, each region into one operator",
    "kept": "Kept as they are, because there is nothing to gain",
    "refused": "Refused, because no single operator equals them",
}


def report_text(document: Mapping[str, Any]) -> str:
    """The report document (`Report.to_dict()`, or the report of a version) as plain text.

    Uses the keys `blocks` and, where there are any, `merges`, `apart`, `joins`, `quantisation`.
    """
    blocks: Sequence[Mapping[str, Any]] = document["blocks"]
    lines: list[str] = []
    for status, title in _STATUS.items():
        chosen = [block for block in blocks if block["status"] == status]
        if chosen:
            lines += ["", f"{title} ({len(chosen)})"]
            lines += [line for block in chosen for line in _block(block)]
    lines += _siblings(document.get("merges", ()), document.get("apart", ()))
    lines += _joins(document.get("joins", ()))
    lines += _sources(blocks)
    lines += _ranges(document.get("quantisation", ()))
    return "\n".join(lines[1:])


def _block(block: Mapping[str, Any]) -> Iterator[str]:
    name = block.get("path") or block["module"] or "the network"
    yield f"  {name}: {_shape(block)}"
    if block["status"] != "fused":
        yield from _wrapped("why", block["reason"])
        return
    own = f"{block['module']}."
    modules = (m.removeprefix(own) for m in block["modules"] if m != block["module"])
    yield from _wrapped("from", ", ".join(modules) or block["module"])
    yield from _wrapped("rules", ", ".join(block["rules"]))
    change = (
        f"{block['operators_before']} operators to {block['operators_after']}, "
        f"{_count(block['macs_before'])} to {_count(block['macs_after'])} multiply-accumulates, "
        f"{_count(block['parameters_before'])} to {_count(block['parameters_after'])} parameters"
    )
    error = block.get("error_float64")
    yield from _wrapped("", change + ("" if error is None else f", float64 error {error:.0e}"))


def _shape(block: Mapping[str, Any]) -> str:
    """The operator that a block is afterwards, as people write one."""
    channels = f"{block['in_channels']} to {block['out_channels']} channels"
    if not block["kernel"]:
        return f"linear, {channels}"
    if not block["convolutions_after"]:
        return f"scale and shift, {block['out_channels']} channels"
    size = "x".join(map(str, block["kernel"]))
    stride = "" if set(block["stride"]) <= {1} else f", stride {max(block['stride'])}"
    groups = "" if block["groups"] == 1 else f", {block['groups']} groups"
    return f"{size} convolution, {channels}{stride}{groups}"


def _siblings(
    merges: Iterable[Mapping[str, Any]], apart: Iterable[Mapping[str, Any]]
) -> Iterator[str]:
    merges, apart = list(merges), list(apart)
    if merges:
        yield from ("", f"Merged, convolutions of one input into one ({len(merges)})")
        for merge in merges:
            yield f"  {', '.join(merge['modules'])}"
    if apart:
        yield from ("", f"Not merged, though they read one input ({len(apart)})")
        for group in apart:
            yield f"  {', '.join(group['modules'])}"
            yield from _wrapped("why", group["reason"])


def _joins(joins: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if joins:
        yield from ("", f"Joined as before, each branch by itself ({len(joins)})")
    for join in joins:
        how = "concatenation" if join["op"] == "aten.cat" else "sum"
        yield f"  {join['module'] or 'the network'}: {how} of {join['branches']} branches"
        yield from _wrapped("why", join["reason"])


def _sources(blocks: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every rule that was applied and where it is published."""
    found: dict[str, str] = {}
    for block in blocks:
        found.update(zip(block["rules"], block["sources"], strict=True))
    if found:
        yield from ("", "Rules and where they come from")
        for rule, source in sorted(found.items()):
            yield f"  {rule}: {source}"


def _ranges(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not layers:
        return
    yield from ("", "Readiness for int8: signal to noise in dB that 8 bits leave, more is better")
    width = min(48, max(len(layer["module"]) for layer in layers))
    yield (
        f"  {'layer':{width}}  {'main branch':>11} {'fused':>6} {'a channel':>9}  "
        f"{'largest':>8}  {'outputs':>18}"
    )
    for layer in layers:
        before, after = layer["before"], layer["after"]
        low, high = layer["activation"]
        outputs = "" if low is None or high is None else f"{low:.3g} to {high:.3g}"
        yield (
            f"  {layer['module']:{width}}  {_db(before and before['sqnr_tensor']):>11} "
            f"{_db(after['sqnr_tensor']):>6} {_db(after['sqnr_channel']):>9}  "
            f"{after['largest']:8.3g}  {outputs:>18}{'  !' if layer['warning'] else ''}"
        )
    yield "  `main branch` and `fused`: one scale for the kernel; `a channel`: one scale a channel"
    warned = [layer for layer in layers if layer["warning"]]
    if not warned:
        yield "  No kernel was widened by fusing so that 8 bits would lose a bit."
    for layer in warned:
        yield from _wrapped("!", f"{layer['module']}: {layer['warning']}")


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _wrapped(label: str, text: str) -> list[str]:
    """`text` under a label, broken at the width of a terminal."""
    head = f"    {label:6s}"
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent=" " * 10, break_long_words=False
    )


def _count(number: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
