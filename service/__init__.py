"""Foldserve: a training checkpoint in; a fused network, its certificate and an endpoint out."""

__version__ = "0.1.0"
