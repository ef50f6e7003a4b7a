"""Walking a pickle without running it, before torch sees it.

torch.load(weights_only=True) calls a short list of functions with whatever arguments the pickle
gives them, and trusts what the pickle says about storages: a storage may claim more bytes than
its record has, a view may repeat one element a billion times. This walk keeps the same stack and
memo as an unpickler but holds only symbols, so every global, storage and view is judged first.
Nothing is imported and nothing is called.
"""

from __future__ import annotations

import io
import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from typing import Any

from service.checkpoint.limits import ReadLimits, exceeded
from service.checkpoint.pickle_calls import Judge, Scan, Storage, malformed
from service.checkpoint.pickle_policy import (
    ALLOWED,
    OPAQUE,
    OPAQUE_MAPPINGS,
    ORDERED_DICT,
)
from service.checkpoint.pickle_values import (
    INERT,
    OTHER,
    Container,
    Global,
    Nested,
    depth_of,
    is_plain,
)
from service.errors import (
    NotACheckpoint,
    PickleBomb,
    TruncatedFile,
    UnsafePickle,
    UnsupportedContainer,
    WholeModulePickle,
)

_PROTOCOL = 2
_MAX_NAMED = 8
_MAX_ODD_KEYS = 1000


__all__ = ["Scan", "Storage", "read_key_list", "scan_pickle"]


def scan_pickle(data: io.BytesIO, limits: ReadLimits, *, other_protocols: bool = False) -> Scan:
    """Walk one pickle from the position of `data` and leave it after the pickle.

    `other_protocols` walks on through pickles that torch.save does not write, to name what is
    in them. Raises UnsafePickle or WholeModulePickle naming the forbidden globals, PickleBomb for
    too many instructions or for calls and keys that cost more than they are long, NestingTooDeep,
    LimitExceeded for too many tensors, TensorOutOfRange for a view beyond its storage,
    TruncatedFile or NotACheckpoint for a pickle that is not whole.
    """
    walk = _Walk(limits, other_protocols)
    try:
        for operation, argument, _ in _operations(data):
            walk.step(operation, argument)
    except (IndexError, KeyError, TypeError):
        # A pickle whose stack does not add up; nothing but its own bytes can cause that.
        raise NotACheckpoint("The pickle is malformed.") from None
    walk.finish()
    return walk.scan


def read_key_list(data: io.BytesIO, limits: ReadLimits) -> list[str]:
    """The strings of a pickled list of strings, in order, which must be nothing else."""
    keys: list[str] = []
    loose, depth, started = 0, 0, False
    for count, (name, argument, _) in enumerate(_operations(data)):
        if count > limits.pickle_operations:
            raise exceeded(limits, "pickle_operations", "The list of storages is longer")
        match name:
            case "PROTO" | "BINPUT" | "LONG_BINPUT":
                continue
            case "EMPTY_LIST" if not started:
                started = True
            case "MARK" if started and not depth and not loose:
                depth = 1
            case "BINUNICODE" if started and (depth or not loose):
                keys.append(argument)
                loose += 1
            case "APPENDS" if depth:
                depth = loose = 0
            case "APPEND" if loose == 1 and not depth:
                loose = 0
            case "STOP" if started and not depth and not loose:
                return keys
            case _:
                break
    raise NotACheckpoint("The list of storages in the file is malformed.")


def _operations(data: io.BytesIO) -> Iterator[tuple[str, Any, int | None]]:
    try:
        for opcode, argument, position in pickletools.genops(data):
            yield opcode.name, argument, position
    except (ValueError, UnicodeDecodeError, OverflowError) as error:
        if data.tell() >= len(data.getbuffer()):
            raise TruncatedFile("The pickle in the file ends too early.") from None
        raise NotACheckpoint(f"The pickle is malformed: {str(error)[:120]}.") from None


class _Walk:
    """The unpickling machine on symbols. `step` is called once an instruction."""

    def __init__(self, limits: ReadLimits, other_protocols: bool) -> None:
        self.scan = Scan()
        self._judge = Judge(self.scan, limits)
        self._limits = limits
        self._other_protocols = other_protocols
        self._steps = 0
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._words: list[str] = []
        self._odd_keys = 0

    def step(self, name: str, argument: Any) -> None:
        self._steps += 1
        if self._steps > self._limits.pickle_operations:
            raise exceeded(self._limits, "pickle_operations", "The pickle has more instructions")
        if isinstance(argument, str) and "UNICODE" in name:
            self._words.append(argument)
        if self.scan.forbidden:
            self._look_on(name, argument)
        elif name in _PUSHES:
            value = _PUSHES[name]
            self._stack.append(argument if value is None else value)
        elif name in _EMPTY:
            self._stack.append(Container())
        else:
            handler = _HANDLERS.get(name)
            if handler is None:
                handler = _LATER_HANDLERS.get(name) if self._other_protocols else None
            if handler is None:
                raise UnsupportedContainer(
                    f"The pickle uses the instruction {name}, which torch.save does not write.",
                    remedy="Save it with torch.save's own pickle_protocol (2).",
                )
            handler(self, argument)

    def finish(self) -> None:
        forbidden = self.scan.forbidden
        if not forbidden:
            return
        named = ", ".join(forbidden[:_MAX_NAMED])
        if len(forbidden) > _MAX_NAMED:
            named += f" and {len(forbidden) - _MAX_NAMED} more"
        if {"_parameters", "_modules"} <= set(self._words):
            raise WholeModulePickle(
                f"The file is a pickled module: reading it would import {named}.",
                globals=forbidden[:_MAX_NAMED],
            )
        raise UnsafePickle(
            f"Reading the pickle would import {named}, which is never done here.",
            globals=forbidden[:_MAX_NAMED],
        )

    def _look_on(self, name: str, argument: Any) -> None:
        """The pickle is refused already: only collect what else it would import."""
        if name in ("GLOBAL", "INST"):
            self._global(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL" and len(self._words) > 1:
            self._global(*self._words[-2:])

    # ---- instructions -----------------------------------------------------------------------

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def protocol(self, number: int) -> None:
        if number != _PROTOCOL and not self._other_protocols:
            raise UnsupportedContainer(
                f"The pickle has protocol {number}; torch.save writes {_PROTOCOL}.",
                remedy=f"Save it again with torch.save(..., pickle_protocol={_PROTOCOL}).",
            )

    def mark(self, _: Any) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _items(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def nothing(self, _: Any) -> None:
        return

    def tuple_of_marked(self, _: Any) -> None:
        items = self._items()
        self._stack.append(self._tuple(items))

    def _tuple(self, items: list[Any]) -> tuple[Any, ...]:
        depth = 1 + max(map(depth_of, items), default=0)
        if depth == 1:
            return tuple(items)
        self._check_depth(depth)
        made = Nested(items)
        made.depth = depth
        return made

    def _check_depth(self, depth: int) -> None:
        if depth > self._limits.nesting:
            raise exceeded(self._limits, "nesting", f"The pickle is nested {depth} deep")

    def list_of_marked(self, _: Any) -> None:
        items = self._items()
        self._stack.append(Container())
        self._add(items)

    def dict_of_marked(self, _: Any) -> None:
        items = self._items()
        self._stack.append(Container())
        self._set(items)

    def append(self, _: Any) -> None:
        self._add([self._stack.pop()])

    def append_marked(self, _: Any) -> None:
        self._add(self._items())

    def add_marked(self, _: Any) -> None:
        items = self._items()
        for item in items:
            self._check_key(item)
        self._add(items)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_marked(self, _: Any) -> None:
        self._set(self._items())

    def _set(self, items: list[Any]) -> None:
        for key in items[::2]:
            self._check_key(key)
        self._add(items)

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if target is OTHER:
            return
        if not isinstance(target, Container):
            malformed("puts items into what is no container")
        for item in items:
            target.add(item)
        self._check_depth(target.depth)

    def _check_key(self, key: Any) -> None:
        """Keys are hashed and compared: a nested tuple takes for ever, chosen numbers nearly so."""
        if is_plain(key) or isinstance(key, Global):
            return
        if type(key) is int:
            raise PickleBomb("The pickle has a key beyond 64 bits, whose hash may be any other's.")
        if isinstance(key, Nested | Container):
            raise PickleBomb("The pickle uses a nested value as a key.")
        self._odd_keys += 1
        if self._odd_keys > _MAX_ODD_KEYS or (
            isinstance(key, tuple) and not all(map(is_plain, key))
        ):
            raise PickleBomb(
                "The pickle uses odd values as keys, or more than 1,000 that are no text."
            )

    def get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def global_(self, argument: str) -> None:
        self._global(*argument.split(" ", 1))

    def stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(str(module), str(name))

    def inst(self, argument: str) -> None:
        self._items()
        self.global_(argument)
        self._stack[-1] = OTHER

    def _global(self, module: str, name: str) -> None:
        module, name = NAME_MAPPING.get((module, name), (module, name))
        full = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if full not in ALLOWED:
            shown = full[:120].encode("ascii", "backslashreplace").decode()
            if shown not in self.scan.forbidden:
                self.scan.forbidden.append(shown)
        self._stack.append(Global(full))

    def obj(self, _: Any) -> None:
        self._items()
        self._stack.append(OTHER)

    def reduce(self, _: Any) -> None:
        self._judge.count()
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            if function is not OTHER:
                malformed("calls what is no function")
            self._stack.append(OTHER)
            return
        self._stack.append(self._judge.call(function.name, arguments))

    def new_object(self, _: Any) -> None:
        self._judge.count()
        _arguments, kind = self._stack.pop(), self._stack.pop()
        name = kind.name if isinstance(kind, Global) else None
        if name in OPAQUE:
            self._stack.append(INERT)
        elif name == ORDERED_DICT or name in OPAQUE_MAPPINGS:
            self._stack.append(Container(has_state=True))
        else:
            # Making tensors or storages this way allocates whatever the arguments say.
            if name in ALLOWED:
                malformed(f"makes a {name} without its constructor")
            self._stack.append(OTHER)

    def new_object_with_keywords(self, _: Any) -> None:
        self._stack.pop()
        self.new_object(None)

    def build(self, _: Any) -> None:
        self._stack.pop()
        # A tensor's state would be its storage and strides, set past every check made here.
        target = self._stack[-1]
        if not (isinstance(target, Container) and target.has_state) and (
            target is not INERT and target is not OTHER
        ):
            malformed("sets the state of what has none")

    def persistent(self, _: Any) -> None:
        self._stack.append(self._judge.storage(self._stack.pop()))


def _tuple_of(count: int) -> Callable[[_Walk, Any], None]:
    def make(walk: _Walk, _: Any) -> None:
        stack = walk._stack
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [walk._tuple(stack[-count:])]

    return make


# Instructions that push: their argument (None here), or a fixed value.
_PUSHES: dict[str, Any] = dict.fromkeys(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
) | {
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
    "NONE": None,
}
_EMPTY = frozenset({"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"})

_HANDLERS: dict[str, Callable[[_Walk, Any], None]] = {
    "PROTO": _Walk.protocol,
    "STOP": _Walk.pop,
    "MARK": _Walk.mark,
    "TUPLE": _Walk.tuple_of_marked,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "APPEND": _Walk.append,
    "APPENDS": _Walk.append_marked,
    "SETITEM": _Walk.set_item,
    "SETITEMS": _Walk.set_marked,
    "BINGET": _Walk.get,
    "LONG_BINGET": _Walk.get,
    "BINPUT": _Walk.put,
    "LONG_BINPUT": _Walk.put,
    "GLOBAL": _Walk.global_,
    "REDUCE": _Walk.reduce,
    "NEWOBJ": _Walk.new_object,
    "BUILD": _Walk.build,
    "BINPERSID": _Walk.persistent,
}


def _push(walk: _Walk, argument: Any) -> None:
    walk._stack.append(argument)


# Instructions of other protocols, walked only to find the globals of a pickle that is refused.
_LATER_HANDLERS: dict[str, Callable[[_Walk, Any], None]] = {
    **dict.fromkeys(
        (
            *("INT", "LONG", "LONG4", "STRING", "BINSTRING", "UNICODE", "FLOAT"),
            *("SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
            "BYTEARRAY8",
        ),
        _push,
    ),
    "FRAME": _Walk.nothing,
    "MEMOIZE": _Walk.memoize,
    "STACK_GLOBAL": _Walk.stack_global,
    "INST": _Walk.inst,
    "OBJ": _Walk.obj,
    "NEWOBJ_EX": _Walk.new_object_with_keywords,
    "POP": _Walk.pop,
    "LIST": _Walk.list_of_marked,
    "DICT": _Walk.dict_of_marked,
    "FROZENSET": _Walk.list_of_marked,
    "ADDITEMS": _Walk.add_marked,
    "GET": _Walk.get,
    "PUT": _Walk.put,
}
