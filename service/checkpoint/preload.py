"""Imported once by the fork server, so that no child has to: see `service.checkpoint.child`."""

from __future__ import annotations

from contextlib import suppress

# torch.export loads the second by itself, at its first use, for most of a second.
import torch._dynamo
import torch.export  # noqa: F401

from service.checkpoint import reader  # noqa: F401
from service.checkpoint.sandbox import load_seccomp

with suppress(ImportError):
    load_seccomp()
