"""Foldserve: a training checkpoint in; a fused network, its certificate and an endpoint out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from torch.export import ExportedProgram

__version__ = "0.1.0"


def pack(
    network: nn.Module | ExportedProgram, example: tuple[Tensor, ...] | None, path: str | Path
) -> Path:
    """Write a network as a bundle that any Foldserve converts and serves without its source code.

    `network` is a module in eval mode with `example` inputs (one tensor per input, any batch size),
    or an exported program, whose `example` is None. Returns the path written.

    Raises InvalidProgram when the module cannot be traced, UnsupportedOperator when it uses an
    operator that programs may not.
    """
    # Imported here, so that `import service` alone stays light.
    from pathlib import Path as _Path

    from torch import nn as _nn

    from service.graph import from_exported, save_program, trace

    if isinstance(network, _nn.Module):
        if example is None:
            raise TypeError("pack(module, example, path) needs example inputs")
        program = trace(network, example)
    else:
        program = from_exported(network)
    target = _Path(path)
    save_program(program, target)
    return target
