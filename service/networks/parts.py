"""Blocks of known dialects inside a network that is not known as a whole, such as a detector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from service.errors import RecognitionError
from service.networks.config import ModelConfig
from service.networks.recognition import Recognition, bare_blocks, recognise


@dataclass(frozen=True)
class Part:
    """One block of a network: its dotted path and what it was recognised as."""

    path: str
    recognition: Recognition

    def state(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block's own state dict, cut out of the network's."""
        prefix = f"{self.path}."
        return {key[len(prefix) :]: t for key, t in whole.items() if key.startswith(prefix)}


def find_parts(state: Mapping[str, Tensor], config: ModelConfig | None = None) -> tuple[Part, ...]:
    """Every training-form block of a known dialect in `state`, outermost first.

    The keys under a block's path must be exactly one block's. Where the config names a block class
    its values hold for every block of that class, as eps must for most detectors.
    """
    requested = (config or ModelConfig()).requested()
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        names = key.split(".")
        for depth in range(1, len(names)):
            path = ".".join(names[:depth])
            groups.setdefault(path, {})[".".join(names[depth:])] = tensor
    parts: list[Part] = []
    for path in sorted(groups, key=lambda path: (path.count("."), path)):
        if any(path.startswith(f"{part.path}.") for part in parts):
            continue
        recognition = _recognised(groups[path], requested.name, requested.values)
        if recognition is not None:
            parts.append(Part(path, recognition))
    order = {path: index for index, path in enumerate(groups)}
    return tuple(sorted(parts, key=lambda part: order[part.path]))


def _recognised(
    state: Mapping[str, Tensor], name: str | None, values: Mapping[str, object]
) -> Recognition | None:
    row = bare_blocks(state)
    if row is None:
        return None
    said = {"name": row, **values} if name is not None and name.lower() == row.lower() else row
    try:
        found = recognise(state, ModelConfig(architecture=said))
    except RecognitionError:
        return None
    return found if found.form == "train" else None
