"""The storages that a pickle claims and the functions that it calls, judged on symbols."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from service.checkpoint.limits import ReadLimits, exceeded
from service.checkpoint.pickle_policy import (
    ALLOWED,
    CALLABLE,
    OPAQUE,
    OPAQUE_MAPPINGS,
    ORDERED_DICT,
    STORAGE_ITEM_BYTES,
    TENSOR_MAKERS,
)
from service.checkpoint.pickle_values import INERT, OTHER, TENSOR, Container, Global, Symbol
from service.errors import NotACheckpoint, PickleBomb, TensorOutOfRange, UnsupportedContainer

_MAX_DIMENSIONS = 64
_MAX_CALLS_PER_TENSOR = 4


@dataclass(frozen=True)
class Storage:
    """A storage as the pickle claims it: record `key`, `count` elements of `item_bytes`."""

    key: str
    type: str
    count: int

    @property
    def bytes(self) -> int:
        """Length of all elements together. Raises KeyError for a type that is not read."""
        return self.count * STORAGE_ITEM_BYTES[self.type]


@dataclass
class Scan:
    """What a pickle refers to; filled by `scan_pickle`.

    Attributes:
        storages: by key.
        tensors: how many are made.
        tensor_bytes: sum of their elements, bytes.
        repeated_bytes: the part of it in tensors with more elements than their storage has.
        forbidden: globals outside the allow-list, in order.
    """

    storages: dict[str, Storage] = field(default_factory=dict)
    tensors: int = 0
    tensor_bytes: int = 0
    repeated_bytes: int = 0
    forbidden: list[str] = field(default_factory=list)


class Judge:
    """What a pickle claims and calls, judged and added up in `scan`; nothing is called."""

    def __init__(self, scan: Scan, limits: ReadLimits) -> None:
        self._scan, self._limits = scan, limits
        self._calls = 0
        self._copied = {"pickle_operations": 0, "pickle_bytes": 0}

    def count(self) -> None:
        """Account for one more call. Raises PickleBomb."""
        # An empty mapping takes 400 bytes and a parameter more, for three instructions.
        self._calls += 1
        if self._calls > _MAX_CALLS_PER_TENSOR * self._limits.tensors:
            raise PickleBomb(
                f"The pickle makes more than {_MAX_CALLS_PER_TENSOR} calls for each of the "
                f"{self._limits.tensors} tensors that it may have.",
                remedy="If the file is legitimate, raise FOLDSERVE_READER_TENSORS.",
            )

    def storage(self, claim: Any) -> Any:
        """The storage that a persistent id claims. Raises NotACheckpoint for any other claim."""
        match claim:
            case ("storage" | b"storage", Global(kind), str(key), str() | bytes(), int(count)):
                pass
            case (
                "storage" | b"storage",
                Global(kind),
                str(key),
                str() | bytes(),
                int(count),
                None,
            ):
                pass
            case _:
                malformed("refers to something other than a storage")
        if kind not in STORAGE_ITEM_BYTES:
            if kind in ALLOWED:
                malformed(f"has a storage of type {kind}")
            return OTHER
        storage = Storage(key, kind, count)
        if not 0 <= count < 1 << 63 or self._scan.storages.setdefault(key, storage) != storage:
            malformed(f"contradicts itself about storage {key[:40]!r}")
        return storage

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """What a call of the global `name` leaves on the stack. Raises for one that costs too much,
        reaches beyond a storage, or that torch.save does not write.
        """
        if name in TENSOR_MAKERS:
            return self._tensor(name, arguments)
        if name == "torch._utils._rebuild_parameter":
            if not arguments or arguments[0] is not TENSOR:
                malformed("makes a parameter of what is no tensor")
            return TENSOR
        if name == "_codecs.encode":
            # How protocol 2 writes bytes. Other codecs may take very long.
            match arguments:
                case (str(text), "latin1" | "latin-1"):
                    self._copy("pickle_bytes", len(text))
                    return OTHER
            malformed("calls a codec other than latin1")
        if name == ORDERED_DICT:
            self._copy_items(arguments, "pairs")
            return Container(has_state=True)
        if name in OPAQUE_MAPPINGS:
            return Container(has_state=True)
        if name == "builtins.set":
            self._copy_items(arguments, "plain")
            return OTHER
        if name == "torch.Size":
            self._copy("pickle_operations", sum(len(a) for a in arguments if isinstance(a, tuple)))
            return OTHER
        if name in OPAQUE:
            return INERT
        if name not in CALLABLE and name in ALLOWED:
            malformed(f"calls {name}")
        return OTHER

    def _copy_items(self, arguments: tuple[Any, ...], kind: str) -> None:
        """A call that hashes the items of its one argument, if it has any."""
        match arguments:
            case ():
                return
            case (Container() as items,) if getattr(items, kind):
                self._copy("pickle_operations", items.size)
            case _:
                malformed("makes a set or a mapping in an unknown way")

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> Symbol:
        fewest, most = TENSOR_MAKERS[name]
        if not fewest <= len(arguments) <= most or not isinstance(arguments[0], Storage):
            malformed("describes a tensor in an unknown way")
        if arguments[6:] not in ((), (None,)):
            raise UnsupportedContainer("A tensor carries extra metadata, which is not read.")
        storage, offset, size, stride = arguments[:4]
        if isinstance(size, Symbol) or not (
            _naturals((offset,)) and _naturals(size) and _naturals(stride)
        ):
            malformed("gives a tensor sizes or strides that are not natural numbers")
        if len(size) != len(stride):
            malformed("gives a tensor more sizes than strides")
        elements = 1
        for length in size:
            elements *= length
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if elements and last >= storage.count:
            raise TensorOutOfRange(
                f"A tensor of shape {list(size)[:8]} reaches element {last} of a storage that has "
                f"{storage.count}."
            )
        self._scan.tensors += 1
        taken = elements * STORAGE_ITEM_BYTES[storage.type]
        self._scan.tensor_bytes += taken
        self._scan.repeated_bytes += taken if elements > storage.count else 0
        if self._scan.tensors > self._limits.tensors:
            raise exceeded(self._limits, "tensors", "The file has more tensors")
        return TENSOR

    def _copy(self, limit: str, amount: int) -> None:
        """Account for what a call copies out of an argument that the pickle may hold only once."""
        self._copied[limit] += amount
        if self._copied[limit] > getattr(self._limits, limit):
            found = f"The pickle's calls copy {self._copied[limit]} items"
            raise exceeded(self._limits, limit, found)


def malformed(what: str) -> NoReturn:
    """Raise NotACheckpoint about what the pickle does."""
    raise NotACheckpoint(f"The pickle {what}; torch.save writes nothing like it.")


def _naturals(values: Any) -> bool:
    """Whether it is a tuple of at most `_MAX_DIMENSIONS` integers that fit 63 bits."""
    return (
        isinstance(values, tuple)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
    )
