"""Programs: what a network is once nobody needs its source code any more."""

from service.graph.memory import peak_bytes
from service.graph.module import ProgramModule, run
from service.graph.operators import DTYPES
from service.graph.program import Argument, DType, Node, Program, Ref, TensorSpec
from service.graph.pt2 import load_pt2
from service.graph.pt2_archive import Pt2Limits
from service.graph.storage import load_program, save_program
from service.graph.trace import from_exported, trace

__all__ = [
    "DTYPES",
    "Argument",
    "DType",
    "Node",
    "Program",
    "ProgramModule",
    "Pt2Limits",
    "Ref",
    "TensorSpec",
    "from_exported",
    "load_program",
    "load_pt2",
    "peak_bytes",
    "run",
    "save_program",
    "trace",
]
