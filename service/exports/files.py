"""Which formats the deploy form can be exported to, and making one in a confined child."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from service.checkpoint.child import ChildLimits, run_sandboxed
from service.errors import ExportFailed, FormatNotInstalled


@dataclass(frozen=True)
class Format:
    """One format: the name it is asked by, its file's ending, and what has to be installed.

    `extra` is the extra of the distribution that brings `packages`.
    """

    name: str
    ending: str
    extra: str
    packages: tuple[str, ...]

    @property
    def artifact(self) -> str:
        """The kind under which the catalog knows the file."""
        return f"deploy_{self.name}"


FORMATS: Mapping[str, Format] = {
    each.name: each
    for each in (
        Format("onnx", "onnx", "onnx", ("onnx", "onnxscript", "onnxruntime")),
        Format("openvino", "openvino.zip", "openvino", ("openvino",)),
    )
}


def is_installed(kind: Format) -> bool:
    """Whether everything that the format needs is here."""
    return all(find_spec(package) is not None for package in kind.packages)


def export_file(
    bundle: Path,
    kind: Format,
    scratch: Path,
    limits: ChildLimits,
    cancel: threading.Event | None = None,
) -> Path:
    """Convert the program in `bundle`, a file of the store, into a checked file in `scratch`.

    Takes seconds to minutes. Raises FormatNotInstalled; ExportFailed when the converter cannot, or
    when the other engine's outputs differ; and what `run_sandboxed` raises.
    """
    _require(kind)
    result: dict[str, Any] = run_sandboxed(
        f"service.exports.convert:{kind.name}_in_child",
        (str(bundle), str(scratch)),
        limits,
        scratch=scratch,
        readable=(bundle, *_homes(kind)),
        cancel=cancel,
    )
    path = scratch / f"deploy.{kind.ending}"
    if result.get("made") is not True or not path.is_file():
        raise ExportFailed(f"The conversion to {kind.name} left no file.")
    return path


def export_own_file(bundle: Path, kind: Format, scratch: Path) -> Path:
    """The same in this process, for a program that was made here and is trusted."""
    _require(kind)
    make = getattr(import_module("service.exports.convert"), f"{kind.name}_in_child")
    make(str(bundle), str(scratch), None)
    return scratch / f"deploy.{kind.ending}"


def _require(kind: Format) -> None:
    if not is_installed(kind):
        raise FormatNotInstalled(
            f"{kind.name} needs {', '.join(kind.packages)}, which are not all installed here.",
            remedy=f"Install the extra: pip install 'foldserve[{kind.extra}]'.",
        )


def _homes(kind: Format) -> set[Path]:
    """The folders in which the format's packages and all that they import are installed."""
    found = (find_spec(package) for package in kind.packages)
    return {Path(spec.origin).parents[1] for spec in found if spec is not None and spec.origin}
