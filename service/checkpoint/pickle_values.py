"""What stands on the stack while a pickle is walked without being run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A function or class as the pickle names it, `module.name`; it is never imported."""

    name: str


class Symbol:
    """A value of which only the kind matters."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


TENSOR, INERT, OTHER = Symbol("tensor"), Symbol("inert"), Symbol("other")


class Container:
    """A list, set or mapping: how long and how deep it is, and whether hashing it is harmless.

    `plain`: all items are text, numbers or None. `pairs`: all items are lists or tuples that begin
    with such a value, which `first_plain` says of this one.
    """

    __slots__ = ("depth", "first_plain", "has_state", "pairs", "plain", "size")

    def __init__(self, *, has_state: bool = False) -> None:
        self.size, self.depth = 0, 1
        self.plain = self.pairs = True
        self.first_plain = False
        self.has_state = has_state

    def add(self, item: Any) -> None:
        """Count one item more, and what it means for `depth`, `plain` and `pairs`."""
        plain = is_plain(item)
        if not self.size:
            self.first_plain = plain
        self.size += 1
        self.plain = self.plain and plain
        self.pairs = self.pairs and (
            item.first_plain
            if isinstance(item, Container)
            else isinstance(item, tuple) and bool(item) and is_plain(item[0])
        )
        self.depth = max(self.depth, depth_of(item) + 1)


class Nested(tuple[Any, ...]):
    """A tuple that holds tuples or containers. One that does not is a plain tuple, of depth 1."""

    depth: int


def depth_of(item: Any) -> int:
    """Levels of containers in a value: 0 for a value that holds none, 1 for a plain tuple."""
    if type(item) is tuple:
        return 1
    return item.depth if isinstance(item, Nested | Container) else 0


def is_plain(item: Any) -> bool:
    """Whether a value hashes at once, and other than every other value.

    Python hashes an integer by its remainder modulo 2**61 - 1, so that a file could give as many
    with the same hash as it likes.
    """
    if type(item) is int:
        return -(1 << 63) <= item < 1 << 63
    return item is None or isinstance(item, str | bool | float)
