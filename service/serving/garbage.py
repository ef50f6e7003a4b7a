"""Keeps Python's garbage collector from looking through everything that was imported.

A full collection visits all objects that could be part of a cycle. PyTorch and an engine's
converter bring half a million that stay for good, and 64 callers at once made one necessary every
second, which held up everybody for 100 ms.
"""

from __future__ import annotations

import gc
import sys

NEW_MODULES = 100
"""So many modules more than before are worth the pause that it takes to set them aside."""


_imported = 0
"""How many modules there were when everything was set aside last."""


def settle() -> bool:
    """Set aside what is there now if much was imported since the last time; whether it did.

    Takes a full collection, so it belongs to a start and to the end of a load. What is set aside
    is still freed when nothing refers to it; only cycles in it are not found any more, and as that
    happens a few times in a process's life, it cannot add up.
    """
    global _imported
    if len(sys.modules) - _imported < NEW_MODULES:
        return False
    _imported = len(sys.modules)
    gc.collect()
    gc.freeze()
    return True
