"""Whether a device still computes at all."""

from __future__ import annotations

import torch

from service.errors import DeviceLost
from service.serving.backends.rows import first_line


def find_lost(place: str) -> DeviceLost | None:
    """Why nothing can be computed on a device until the process is another one; None if it can.

    After a failed assertion or an illegal access on a CUDA device every later call of the process
    fails as that one did. Other errors are reported once, perhaps by a call that is not to blame,
    so the device is asked twice. A device that is merely full is not lost, and a CPU never is.
    """
    device = torch.device(place)
    if device.type != "cuda":
        return None
    reason = ""
    for _ in range(2):
        try:
            _compute(device)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                return None
            reason = first_line(error)
        else:
            return None
    return DeviceLost(f"{place}: {reason}", device=place)


def _compute(device: torch.device) -> None:
    """A little work, and the wait for all that was begun before."""
    torch.zeros(1, device=device).add_(1)
    torch.cuda.synchronize(device)
