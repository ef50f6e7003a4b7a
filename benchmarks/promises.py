"""What this service promises of its speed, each with the figure that was measured for it.

A promise is held when the median of the rounds holds it. It is decided only where the rounds agree:
if some hold it and some do not, the line says that it is open. Where peers are compared, the best
of them in the same round counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

BOUND_SHARE = 0.9
BEST_PEER = 1.5
IDEAL_P99 = 1.5
TRAINING_FORM: Mapping[bool, Mapping[str, float]] = {
    False: {"float32": 1.7, "bfloat16": 3.0, "int8": 3.5},
    True: {"float32": 3.0, "bfloat16": 6.0},
}
"""Speed-up over the training form in eager PyTorch, by contention and precision."""


@dataclass(frozen=True)
class Promise:
    """One promise: what of, the bound of `figures`, on which side of it they are to be."""

    what: str
    bound: float
    figures: tuple[float, ...]
    side: Literal["at least", "more than", "at most"] = "at least"

    def holds(self, figure: float) -> bool:
        """Whether one figure keeps the promise."""
        if self.side == "at most":
            return figure <= self.bound
        return figure > self.bound if self.side == "more than" else figure >= self.bound

    @property
    def verdict(self) -> str:
        """`held`, `NOT held`, or `open` where the figures disagree, with the median's side."""
        held = self.holds(statistics.median(self.figures))
        agreed = len({self.holds(figure) for figure in self.figures}) == 1
        word = "held" if held else "NOT held"
        return word if agreed else f"open (by the median {word})"


def lines(promises: Sequence[Promise]) -> Iterator[str]:
    """The promises as Markdown, a heading first; nothing where there are none."""
    if not promises:
        return
    yield "\n## Promises\n"
    yield "| promise | figure | verdict |"
    yield "|---|---|---|"
    for promise in promises:
        low, high = min(promise.figures), max(promise.figures)
        middle = statistics.median(promise.figures)
        spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
        yield (
            f"| {promise.what}: {promise.side} {promise.bound:g} "
            f"| {middle:.2f}{spread} | {promise.verdict} |"
        )


@dataclass(frozen=True)
class Round:
    """Requests a second of every server in one round of one kind of load, and this one's p99."""

    rates: Mapping[str, float]
    p99: float


OWN, OWN_SEVERAL = "foldserve", "foldserve, HTTP apart"
BOUND, NOTHING = "in-process", "nothing"


def of_server(
    network: str, body: str, concurrency: int, rounds: Sequence[Round]
) -> Iterator[Promise]:
    """What one kind of load is promised; `rounds` have the same servers."""
    peers = set(rounds[0].rates) - {OWN, OWN_SEVERAL, BOUND, NOTHING} if rounds else set()
    load = f"{network}, {body}, concurrency {concurrency}"
    if body != "binary" or not rounds:
        return
    if network == "tiny":
        for own, peer in product((OWN, OWN_SEVERAL), sorted(peers)):
            if own in rounds[0].rates:
                ratios = tuple(one.rates[own] / max(one.rates[peer], 1e-9) for one in rounds)
                which = "" if own == OWN else f"{own}: "
                what = f"{load}: {which}requests a second over {peer}"
                yield Promise(what, 1.0, ratios, "more than")
        return
    if concurrency in (8, 64):
        if BOUND in rounds[0].rates:
            shares = tuple(one.rates[OWN] / one.rates[BOUND] for one in rounds)
            yield Promise(f"{load}: share of OpenVINO's throughput mode", BOUND_SHARE, shares)
        if peers:
            best = tuple(
                one.rates[OWN] / max(max(one.rates[peer] for peer in peers), 1e-9) for one in rounds
            )
            yield Promise(f"{load}: times the best peer", BEST_PEER, best)
    if concurrency == 8 and BOUND in rounds[0].rates:
        over = tuple(one.p99 / (concurrency / one.rates[BOUND]) for one in rounds)
        yield Promise(f"{load}: p99 over its ideal", IDEAL_P99, over, "at most")


def of_shares(
    speedups: Mapping[str, tuple[float, float, float]], batch: int, contended: bool
) -> Iterator[Promise]:
    """Speed-ups over the training form at one batch size: low, median and high by precision."""
    where = "under contention" if contended else "on a machine left alone"
    for precision, bound in TRAINING_FORM[contended].items():
        if precision in speedups:
            what = f"batch {batch}, {where}: {precision} times the training form in eager PyTorch"
            yield Promise(what, bound, speedups[precision])
