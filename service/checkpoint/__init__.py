"""Reading checkpoints that nobody vouches for, and the child process in which that is done."""

from __future__ import annotations

from service.checkpoint.limits import ReadLimits
from service.checkpoint.reader import Checkpoint, read_checkpoint

__all__ = ["Checkpoint", "ReadLimits", "read_checkpoint"]
