"""The row that a family adds to the table of known networks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from service.networks.base import Reparameterizable
from service.networks.keys import Keys

Values = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """What keys and shapes said about one network.

    `values` are keyword arguments of the constructor, JSON-able; `evidence` says which keys and
    shapes told them; `assumed` says what they could not tell and what was taken instead. `size` is
    the input height and width where the shapes tell that too.
    """

    values: Values
    evidence: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    size: int | None = None


@dataclass(frozen=True)
class Family:
    """One network or block class that can be recognised and built.

    `read(keys, hints)` gives a Reading, where `hints` are constructor values that the uploader
    fixed, and `in_channels` if they gave an input shape. `named` are the published configurations.
    `dropped` matches keys that training alone uses and that are left out. `size` is the input
    height and width that is assumed unless the config gives one; `shape` replaces both where the
    input is no image (the empty shape for features alone). Where `whole` is given, every key must
    match it: names as common as `conv1` tell nothing otherwise.
    """

    family: str
    network: str
    signature: re.Pattern[str]
    read: Callable[[Keys, Values], Reading]
    make: Callable[..., nn.Module]
    named: Mapping[str, Values] = field(default_factory=dict)
    dropped: re.Pattern[str] | None = None
    size: int = 224
    shape: tuple[int, ...] | None = None
    whole: re.Pattern[str] | None = None

    @property
    def bare(self) -> bool:
        """Whether this is a block class and no network."""
        made = self.make.func if isinstance(self.make, partial) else self.make
        return isinstance(made, type) and issubclass(made, Reparameterizable)

    def input_shape(self, channels: int, size: int | None = None) -> tuple[int, ...]:
        """The input shape without the batch axis for `channels`; assumed unless `size` is told."""
        if self.shape is not None:
            return (channels, *self.shape)
        return (channels, size or self.size, size or self.size)

    def claims(self, keys: Keys) -> bool:
        """Whether any key has the family's signature, and every key is one it may have."""
        if self.whole is not None and not all(map(self.whole.search, keys.shapes)):
            return False
        return any(map(self.signature.search, keys.shapes))

    def parameters(self) -> list[str]:
        """The names of the constructor values."""
        return list(inspect.signature(self.make).parameters)

    def complete(self, values: Values) -> Values:
        """`values` with the constructor's defaults for those that are not given."""
        parameters = inspect.signature(self.make).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {name: _plain(value) for name, value in {**defaults, **values}.items()}


def _plain(value: Any) -> Any:
    """The same value as JSON would give it back: lists for tuples, string keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
