"""Networks that another library builds: timm's, where it is installed and the uploader names one.

The library is imported in the process that converts, and only for a config that asks for it. Names
are those of its registry alone (no hub and no folder), and what would read another file is refused,
so nothing is downloaded and no weights but the uploaded ones are loaded.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from service.errors import InvalidConfig, out_of_memory

PREFIX = "timm/"
_NAME = re.compile(r"timm/[a-z0-9_]{1,80}(\.[a-z0-9_]{1,80})?")
_VALUE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_READS_FILES = ("pretrained", "checkpoint", "cache")
"""What arguments begin with that would load weights from elsewhere."""


def is_foreign(name: str | None) -> bool:
    """Whether `config.architecture` names a network of another library."""
    return name is not None and name.startswith(PREFIX)


def create(name: str, values: Mapping[str, Any]) -> nn.Module:
    """The network `timm/<model>` with random weights and `values` as arguments of its factory.

    Raises InvalidConfig where timm is not installed, for a name that it does not have, and for a
    value that is no plain number, text or truth value, or that would load weights.
    """
    if not _NAME.fullmatch(name):
        raise _refused(f"`architecture` is {name[:80]!r}, which is no name of a timm model.")
    for key, value in values.items():
        if not _VALUE.fullmatch(key) or key.startswith(_READS_FILES):
            raise _refused(f"`architecture.{key[:80]}` is not an argument that may be given.", key)
        if value is not None and not isinstance(value, bool | int | float | str):
            raise _refused(f"`architecture.{key}` is not a number, a text or a truth value.", key)
    try:
        library = importlib.import_module("timm")
    except ImportError as error:
        raise InvalidConfig(
            f"`architecture` names {name!r}, but timm cannot be imported here: {error}.",
            remedy="Run `pip install timm` where the service runs, or upload a bundle that "
            "`foldserve pack` made.",
            field="architecture",
        ) from None
    try:
        network = library.create_model(name.removeprefix(PREFIX), pretrained=False, **values)
    except Exception as error:
        if out_of_memory(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise _refused(f"timm does not build {name!r} with these values: {first}") from None
    if not isinstance(network, nn.Module):
        raise _refused(f"timm gives no network for {name!r}.")
    return network


def classes_of(network: nn.Module) -> int | None:
    """How many classes a network says that it tells apart, if it says so."""
    classes = getattr(network, "num_classes", None)
    return classes if isinstance(classes, int) and classes > 0 else None


def input_shape_of(network: nn.Module) -> tuple[int, ...] | None:
    """(channels, height, width) that a network says it was made for, if it says so."""
    configuration = getattr(network, "pretrained_cfg", None)
    size = configuration.get("input_size") if isinstance(configuration, Mapping) else None
    if not isinstance(size, list | tuple) or not all(isinstance(n, int) and n > 0 for n in size):
        return None
    return tuple(size) or None


def _refused(detail: str, key: str | None = None) -> InvalidConfig:
    field = "architecture" if key is None else f"architecture.{key[:80]}"
    return InvalidConfig(detail, remedy="See docs/networks.md.", field=field)
