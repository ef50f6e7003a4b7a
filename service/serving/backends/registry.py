"""The backends by the names that `config` may hold."""

from __future__ import annotations

from service.errors import BackendFailed
from service.serving.backends.base import Backend
from service.serving.backends.openvino_backend import OpenVinoBackend, is_installed
from service.serving.backends.torch_backend import TorchBackend


def backend_names() -> tuple[str, ...]:
    """The backends that can be used here; `torch` always, others where they are installed."""
    return ("torch", "openvino") if is_installed() else ("torch",)


def backend_named(name: str) -> Backend:
    """The backend called `name`. Raises BackendFailed if it cannot be used here."""
    known = backend_names()
    if name == "torch":
        return TorchBackend()
    if name == "openvino" and name in known:
        return OpenVinoBackend()
    raise BackendFailed(
        f"There is no backend {name!r} here; known: {', '.join(known)}.",
        remedy="Choose one of those, or install the optional package of the one you want.",
    )
