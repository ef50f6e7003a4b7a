"""The backends by the names that `config` may hold."""

from __future__ import annotations

from service.errors import BackendFailed
from service.serving.backends import quantise
from service.serving.backends.auto_backend import AutoBackend
from service.serving.backends.base import Backend
from service.serving.backends.choices import Choices
from service.serving.backends.openvino_backend import OpenVinoBackend, is_installed
from service.serving.backends.torch_backend import TorchBackend

_CHOICES = Choices()  # for callers without a place to remember things in


def backend_names() -> tuple[str, ...]:
    """The backends that can be used here; `torch` always, others where they are installed."""
    return ("torch", "openvino") if is_installed() else ("torch",)


def can_quantise() -> bool:
    """Whether int8 is possible here: OpenVINO computes it, the package nncf prepares it."""
    return is_installed() and quantise.is_installed()


def backend_named(name: str, choices: Choices | None = None, threads: int = 0) -> Backend:
    """The backend called `name`, or `auto` for the fastest here, checked against PyTorch.

    What has to be measured is remembered in `choices`, for `threads` CPU threads (0: those of the
    calling thread). Raises BackendFailed if the backend cannot be used here.
    """
    choices = choices or _CHOICES
    torch = TorchBackend(choices)
    usable: dict[str, Backend] = {"torch": torch}
    if is_installed():
        usable["openvino"] = OpenVinoBackend(choices)
    if name == "auto":
        return AutoBackend(list(usable.values()), torch, choices, threads)
    if name not in usable:
        raise BackendFailed(
            f"There is no backend {name!r} here; known: auto, {', '.join(usable)}.",
            remedy="Choose one of those, or install the optional package of the one you want.",
        )
    return AutoBackend([usable[name]], torch, choices, threads)
