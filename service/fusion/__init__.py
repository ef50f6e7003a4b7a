"""The fusion engine: linear multi-branch regions of a program become single operators."""

from service.fusion.blocks import BlockLayer, block_tensors
from service.fusion.certificate import Certificate, CertificateLimits, certify
from service.fusion.engine import Fusion, fuse
from service.fusion.ranges import LayerRange, quantisation_report, ranges_to_dict
from service.fusion.report import Block, Report, Totals
from service.fusion.sources import Rule
from service.fusion.text import report_text

__all__ = [
    "Block",
    "BlockLayer",
    "Certificate",
    "CertificateLimits",
    "Fusion",
    "LayerRange",
    "Report",
    "Rule",
    "Totals",
    "block_tensors",
    "certify",
    "fuse",
    "quantisation_report",
    "ranges_to_dict",
    "report_text",
]
