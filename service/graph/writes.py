"""Turning in-place calls into functional ones, where that cannot change a result.

A call such as `relu_(x)` changes every value that shares x's memory. It may become `relu(x)` when
later readers of x read the result instead, and when nothing that shares the memory under another
name (a view of x, or what x is a view of) is read afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.errors import InvalidProgram, UnsupportedOperator
from service.graph.operators import ATEN

_MAY_SHARE = frozenset({"aten.einsum", "aten.type_as", "aten.tile", "aten.channel_shuffle"})
"""Operators that may return their argument or a view of it, though the schema does not say so."""


def shares_memory(op: str) -> bool:
    """Whether the result of `op` may lie in the memory of an argument."""
    if op not in ATEN:
        return False
    return op in _MAY_SHARE or any(a.alias_info is not None for a in ATEN[op]._schema.arguments)


def functional(op: str) -> str | None:
    """The listed operator that computes what the in-place `op` writes, or None when `op` is not
    in place.

    Raises UnsupportedOperator when there is none with the same arguments.
    """
    packet, _, overload = op.removeprefix("aten.").partition(".")
    if op in ATEN or not packet.endswith("_") or packet.endswith("__"):
        return None
    pure = f"aten.{packet[:-1]}" + (f".{overload}" if overload else "")
    if pure not in ATEN:
        raise UnsupportedOperator(f"The in-place {op[:80]!r} has no listed form.", operator=op[:80])
    return pure


class Writes:
    """Which values share memory, and which of them an in-place call has left out of date."""

    def __init__(self) -> None:
        self._group: dict[str, set[str]] = {}
        self._kept: set[str] = set()
        self._stale: dict[str, str] = {}

    def outer(self, name: str) -> None:
        """`name` is an input or a weight: its memory belongs to the caller."""
        self._group[name] = {name}
        self._kept.add(name)

    def result(self, name: str, op: str, reads: Iterable[str]) -> None:
        """`name` is what `op` makes of `reads`."""
        self._group[name] = {name}
        if shares_memory(op):
            for read in reads:
                self._join(self._group[name], self._group.get(read, set()))

    def check_read(self, name: str) -> None:
        """Raises UnsupportedOperator when an in-place call has changed `name` underneath."""
        if name in self._stale:
            raise UnsupportedOperator(
                f"The in-place {self._stale[name][:80]!r} changes a tensor that is read later "
                "through a view.",
                remedy="Write that step without changing a tensor in place, and export again.",
                operator=self._stale[name][:80],
            )

    def overwrite(self, old: str, new: str, op: str) -> None:
        """The in-place `op` on `old` gives `new`. Raises InvalidProgram for inputs and weights."""
        group = self._group[old]
        if not self._kept.isdisjoint(group):
            raise InvalidProgram(
                f"The in-place {op[:80]!r} changes an input or a weight.",
                remedy="Write that step without changing a tensor in place, and export again.",
            )
        self._stale.update(dict.fromkeys(group, op))
        group.clear()  # they are never read again
        self._group[new] = {new}

    def _join(self, one: set[str], other: set[str]) -> None:
        small, large = sorted((one, other), key=len)
        if small is not large:
            large |= small
            for member in small:
                self._group[member] = large
