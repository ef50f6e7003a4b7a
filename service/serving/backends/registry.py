"""The backends by the names that `config` may hold."""

from __future__ import annotations

from service.errors import BackendFailed
from service.serving.backends.auto_backend import AutoBackend
from service.serving.backends.base import Backend
from service.serving.backends.openvino_backend import OpenVinoBackend, is_installed
from service.serving.backends.torch_backend import TorchBackend

_TORCH = TorchBackend()
_OPENVINO = OpenVinoBackend()
_AUTO = AutoBackend([_TORCH, _OPENVINO])  # one for the process: it remembers what it chose
_AUTO_TORCH = AutoBackend([_TORCH])


def backend_names() -> tuple[str, ...]:
    """The backends that can be used here; `torch` always, others where they are installed."""
    return ("torch", "openvino") if is_installed() else ("torch",)


def backend_named(name: str) -> Backend:
    """The backend called `name`, or `auto` for the fastest here.

    Raises BackendFailed if it cannot be used here.
    """
    usable: dict[str, Backend] = {"torch": _TORCH, "auto": _AUTO_TORCH}
    if is_installed():
        usable |= {"openvino": _OPENVINO, "auto": _AUTO}
    if name not in usable:
        raise BackendFailed(
            f"There is no backend {name!r} here; known: {', '.join(usable)}.",
            remedy="Choose one of those, or install the optional package of the one you want.",
        )
    return usable[name]
