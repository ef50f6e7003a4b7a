"""`fuse`: the whole engine in the order in which it happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from service.fusion.analysis import Analysis, analyse
from service.fusion.cover import Cover, cover
from service.fusion.report import Report, make_report
from service.fusion.rewrite import Region, rewrite
from service.fusion.siblings import Merge, merge_siblings
from service.graph.program import Program
from service.graph.trace import trace


@dataclass(frozen=True)
class Fusion:
    """The fused program, what was done, and the means to check it.

    `source` is the program that was fused; it is never changed. `separate` has one operator a
    region, in `program` sibling convolutions are merged. Values keep their names, but those in
    `renamed`, which turned out to be another value.
    """

    source: Program
    separate: Program
    program: Program
    report: Report
    regions: tuple[Region, ...]
    merges: tuple[Merge, ...]
    renamed: Mapping[str, str]
    analysis: Analysis
    cover: Cover

    def rewritten_in(self, dtype: str) -> Program:
        """One operator a region, before siblings are merged, stored in `dtype`."""
        return rewrite(self.analysis, self.cover, dtype).program

    def program_in(self, dtype: str) -> Program:
        """The fused program with kernels computed in float64 and stored in `dtype`."""
        return merge_siblings(self.rewritten_in(dtype)).program


def fuse(network: Program | nn.Module, example: tuple[Tensor, ...] | None = None) -> Fusion:
    """Fuse every linear multi-branch region of a network into one operator.

    `network` is a program, or a module in eval mode together with `example` inputs (one tensor per
    input, any batch size). Weights of the result are float32, as those of the source.

    Raises GraphError kinds when a module cannot be traced. A region that cannot be fused exactly is
    no error: it stays, and the report says why.
    """
    if isinstance(network, nn.Module):
        if example is None:
            raise TypeError("fuse(module, example) needs example inputs to trace the module with")
        network = trace(network, example)
    analysis = analyse(network)
    chosen = cover(analysis)
    rewritten = rewrite(analysis, chosen, "float32")
    merged = merge_siblings(rewritten.program)
    report = make_report(analysis, chosen, rewritten.regions, merged)
    return Fusion(
        source=network,
        separate=rewritten.program,
        program=merged.program,
        report=report,
        regions=rewritten.regions,
        merges=merged.merges,
        renamed=rewritten.renamed,
        analysis=analysis,
        cover=chosen,
    )
