"""The fusion engine: linear multi-branch regions of any program become single operators, exactly."""

from service.fusion.affine import Rule
from service.fusion.engine import Fusion, fuse
from service.fusion.report import Block, Report, Totals

__all__ = ["Block", "Fusion", "Report", "Rule", "Totals", "fuse"]
