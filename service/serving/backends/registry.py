"""The backends by the names that `config` may hold."""

from __future__ import annotations

from service.errors import BackendFailed
from service.serving.backends.base import Backend
from service.serving.backends.torch_backend import TorchBackend

_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TorchBackend(),)}


def backend_names() -> tuple[str, ...]:
    """Every name that `backend_named` knows."""
    return tuple(_BACKENDS)


def backend_named(name: str) -> Backend:
    """The backend called `name`. Raises BackendFailed, listing the known ones."""
    try:
        return _BACKENDS[name]
    except KeyError:
        known = ", ".join(_BACKENDS)
        raise BackendFailed(
            f"There is no backend {name!r}; known: {known}.",
            remedy="Choose one of the backends that the detail lists.",
        ) from None
