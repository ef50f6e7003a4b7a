"""Foldserve: upload a training checkpoint, get the fused network, its certificate and an endpoint."""

__version__ = "0.1.0"
