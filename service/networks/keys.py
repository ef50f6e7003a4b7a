"""Reading hyper-parameters out of the keys and shapes of a state dict.

Everything here looks at shapes alone and allocates nothing, because the file may be hostile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from service.errors import MissingKeys, ShapeMismatch

Shape = tuple[int, ...]


class Keys:
    """The keys of a state dict with the shape of each, seen from a dotted prefix."""

    def __init__(self, shapes: Mapping[str, Shape], prefix: str = "") -> None:
        self.shapes = shapes
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self.shapes

    def under(self, prefix: str) -> Keys:
        """Only the keys that begin with `prefix`, without it; `prefix` ends with a dot."""
        cut = len(prefix)
        inner = {key[cut:]: shape for key, shape in self.shapes.items() if key.startswith(prefix)}
        return Keys(inner, self.prefix + prefix)

    def any(self, prefix: str) -> bool:
        """Whether any key begins with `prefix`."""
        return any(key.startswith(prefix) for key in self.shapes)

    def shape(self, *candidates: str, rank: int = 4) -> Shape:
        """The shape of the first candidate that is present.

        Raises MissingKeys when none is, ShapeMismatch when its rank differs or an extent is 0.
        """
        for key in candidates:
            if key in self.shapes:
                shape = self.shapes[key]
                if len(shape) != rank or 0 in shape:
                    raise ShapeMismatch(
                        f"`{self.prefix}{key}` has shape {show(shape)}; a tensor of rank {rank} "
                        "without empty axes belongs there.",
                        keys=[self.prefix + key],
                    )
                return shape
        names = " or ".join(f"`{self.prefix}{key}`" for key in candidates)
        raise MissingKeys(f"{names} is missing.", keys=[self.prefix + key for key in candidates])

    def count(self, prefix: str) -> int:
        """How many numbered children `prefix` has: n where `prefix` 0, 1, ... n-1 exist.

        Raises MissingKeys when the numbers leave a gap.
        """
        return self.count_from(0, prefix)

    def count_from(self, first: int, prefix: str = "") -> int:
        """How many numbered children there are when counting begins at `first` instead of 0."""
        key = re.compile(re.escape(prefix) + r"([0-9]{1,4})(?=\.|$)")
        found = {int(match[1]) for name in self.shapes if (match := key.match(name))}
        absent = set(range(first, first + len(found))) - found
        if absent:
            place = f"{self.prefix}{prefix}{min(absent)}"
            raise MissingKeys(
                f"Nothing is stored under `{place}.`, though `{self.prefix}{prefix}{max(found)}.` "
                "exists.",
                keys=[place],
            )
        return len(found)

    def width(self) -> int:
        """The channels most one-dimensional tensors here agree on; one damaged tensor is outvoted.

        Raises MissingKeys when there is no such tensor.
        """
        votes = Counter(shape[0] for shape in self.shapes.values() if len(shape) == 1 and shape[0])
        if not votes:
            place = self.prefix.rstrip(".") or "the state dict"
            raise MissingKeys(
                f"Under `{place}` no batch norm or bias tells the width.", keys=[place]
            )
        return votes.most_common(1)[0][0]


def show(shape: Shape) -> str:
    """A shape for people: `64x3x7x7`, or `scalar`."""
    return "x".join(map(str, shape)) or "scalar"


def ratio(whole: int, part: int) -> int:
    """`whole / part` where it divides evenly, else 1: a damaged shape must not decide groups."""
    return whole // part if part and whole % part == 0 else 1
