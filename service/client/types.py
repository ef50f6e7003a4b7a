"""What the service answers, as the client hands it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Picture = str | Path | bytes | Image
    Input = Picture | Sequence[Picture] | NDArray[Any]
    Rows = str | Path | bytes | NDArray[Any]

DEFAULT_URL = "http://127.0.0.1:8000"

Json = dict[str, Any]
Form = Literal["deploy", "train"]
Format = Literal["safetensors", "pth", "bundle", "onnx", "openvino"]
Transferred = Callable[[int, int], None]
"""Told (bytes sent so far, bytes in all) while a file is uploaded."""


@dataclass(frozen=True)
class Version:
    """A version as the service describes it; `raw` is the whole resource."""

    model: str
    version: int
    state: str
    checkpoint: Json
    architecture: Json | None
    fusion: Json | None
    error: Json | None
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, raw: Json) -> Version:
        """From the resource as the service answers it. Raises KeyError when a field is missing."""
        names = ("model", "version", "state", "checkpoint", "architecture", "fusion", "error")
        return cls(**{name: raw[name] for name in names}, raw=raw)

    @property
    def final(self) -> bool:
        """Whether the conversion has ended."""
        return self.state in ("ready", "rejected")


@dataclass(frozen=True)
class Label:
    """One class of a prediction with its softmax probability."""

    label: str
    index: int
    score: float
