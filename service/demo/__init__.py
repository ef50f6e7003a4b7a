"""`foldserve demo`: the whole way of a checkpoint on real data, over HTTP, with its checks."""

from __future__ import annotations

from service.demo.run import run

__all__ = ["run"]
