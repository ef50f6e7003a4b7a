"""Finding the state dict in what training scripts save around it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from service.checkpoint.limits import ReadLimits, exceeded
from service.errors import NoStateDict, OptimizerOnly, UnsafeName

Weights = Literal["model", "ema"]

_MODEL_KEYS = (
    *("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module"),
    *("params", "weights"),
)
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "params_ema", "ema_net")
_PREFIXES = ("module.", "_orig_mod.")
_MAX_DEPTH = 4
_MAX_NAMED = 12
_LEAVES_ITS_FOLDER = re.compile(r"\\|^/|(^|/)\.{1,2}(/|$)")
"""A key that names a file elsewhere, for who writes a file for each tensor."""


def unwrap(
    loaded: object, weights: Weights, limits: ReadLimits
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict in `loaded`, and the wrappers taken off from the outside in.

    With "model" the plain weights are taken, and a moving average only from a file that holds
    nothing else; with "ema" the moving average must be there. A prefix that data-parallel
    (`module.`) or compiled (`_orig_mod.`) training put before every key is removed. Entries that
    are not tensors are left out. Raises NoStateDict or OptimizerOnly, naming the keys that were
    found, and what `check_keys` raises.
    """
    top = _mapping(loaded)
    if top is None:
        kind = "a single tensor" if isinstance(loaded, Tensor) else f"a {type(loaded).__name__}"
        raise NoStateDict(f"The file holds {kind}, not a mapping from names to tensors.")
    found, wrappers, averaged = top, list[str](), False
    for _ in range(_MAX_DEPTH):
        model, ema = _first(found, _MODEL_KEYS), _first(found, _EMA_KEYS)
        choice = (ema if not averaged else None) or model if weights == "ema" else model or ema
        if choice is None:
            break
        averaged = averaged or choice in _EMA_KEYS
        wrappers.append(choice)
        inner = _mapping(found[choice])
        assert inner is not None
        found = inner
    if weights == "ema" and not averaged:
        raise NoStateDict(
            f"The file holds no moving average; its keys are {_named(top)}.",
            remedy="Leave out `weights` in `config`, or upload the checkpoint with the average.",
            keys=_shown(top),
        )
    state = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not state or not all(isinstance(key, str) for key in state):
        raise _none(top)
    check_keys(state, limits)
    prefixes, state = _without_prefixes(state)
    return state, (*wrappers, *prefixes)


def check_keys(state: dict[str, Tensor], limits: ReadLimits) -> None:
    """Raises LimitExceeded for a long key and UnsafeName for one that cannot be shown or used.

    A slash inside is let through: HDF5 files hold such keys.
    """
    for key in state:
        if len(key) > limits.key_characters:
            raise exceeded(limits, "key_characters", f"A key has {len(key)} characters")
        if not key.isprintable():
            raise UnsafeName(f"The key {key[:80]!a} holds characters that cannot be shown.")
        if _LEAVES_ITS_FOLDER.search(key):
            raise UnsafeName(f"The key {key[:80]!r} is a path out of its folder.")


def _mapping(value: object) -> dict[Any, Any] | None:
    """A plain dict of the items; attributes that a pickle set on the mapping are not trusted."""
    return dict(dict.items(value)) if isinstance(value, dict) else None


def _first(found: dict[Any, Any], names: Iterable[str]) -> str | None:
    """The first of `names` under which there is a mapping that leads to tensors."""
    return next((name for name in names if _leads_to_tensors(found.get(name))), None)


def _leads_to_tensors(
    value: object, depth: int = _MAX_DEPTH, barren: set[tuple[int, int]] | None = None
) -> bool:
    """`barren` are mappings, by identity, that were seen to lead nowhere at a depth.

    Without it a mapping that is wrapped in every name at every depth is gone through 50,000 times.
    """
    barren = set() if barren is None else barren
    if not isinstance(value, dict) or (id(value), depth) in barren:
        return False
    if any(isinstance(key, str) and isinstance(item, Tensor) for key, item in dict.items(value)):
        return True
    nested = (dict.get(value, name) for name in (*_MODEL_KEYS, *_EMA_KEYS))
    found = depth > 0 and any(_leads_to_tensors(item, depth - 1, barren) for item in nested)
    if not found:
        barren.add((id(value), depth))
    return found


def _without_prefixes(state: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    taken = list[str]()
    while True:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return taken, state
        taken.append(prefix)
        state = {key.removeprefix(prefix): value for key, value in state.items()}


def _none(top: dict[Any, Any]) -> NoStateDict:
    keys, shown = _named(top), _shown(top)
    if "param_groups" in top or ("optimizer" in top and not _first(top, _MODEL_KEYS)):
        text = f"The file holds an optimizer's state but no weights; its keys are {keys}."
        return OptimizerOnly(text, keys=shown)
    if not top:
        return NoStateDict("The file holds an empty mapping.", keys=shown)
    text = f"The file's mapping leads to no tensors by name; its keys are {keys}."
    return NoStateDict(text, keys=shown)


def _shown(top: dict[Any, Any]) -> list[str]:
    """The first keys as text that any log and any response can hold."""
    return [
        str(key)[:80].encode("utf-8", "backslashreplace").decode()
        if isinstance(key, str | int)
        else "?"
        for key in list(top)[:_MAX_NAMED]
    ]


def _named(top: dict[Any, Any]) -> str:
    more = f" and {len(top) - _MAX_NAMED} more" if len(top) > _MAX_NAMED else ""
    return ", ".join(repr(key) for key in _shown(top)) + more
