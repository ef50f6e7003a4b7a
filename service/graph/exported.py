"""A program as an exported program of PyTorch, which other tools read; its batch may vary."""

from __future__ import annotations

from threading import Lock

import torch
from torch.export import Dim, ExportedProgram, export

from service.graph.module import ProgramModule
from service.graph.operators import DTYPES
from service.graph.program import Program

_EXPORTING = Lock()  # torch.export does not promise to work in two threads at once
_MOST_ROWS = 1 << 16


def to_exported(program: Program) -> ExportedProgram:
    """`program` through torch.export, with a leading axis of 1 to 65536 rows.

    Raises whatever torch.export raises for a program that it cannot follow.
    """
    example = tuple(torch.zeros(spec.sized(2), dtype=DTYPES[spec.dtype]) for spec in program.inputs)
    batch = Dim("batch", min=1, max=_MOST_ROWS)
    shapes = {"inputs": tuple({0: batch} for _ in example)}
    with _EXPORTING:
        return export(ProgramModule(program), example, dynamic_shapes=shapes)
