"""torch.export archives as torch writes them, and as an attacker rewrites them."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from service.checkpoint import read_checkpoint
from service.graph import Program, Pt2Limits, load_pt2

Entries = dict[str, bytes]
Form = Literal["training", "functional", "core"]


def exported(
    module: nn.Module, *example: Tensor, form: Form = "training", low: int = 1, high: int = 64
) -> ExportedProgram:
    """`module` in eval mode, exported with a dynamic batch, decomposed as `form` says."""
    batch = Dim("batch", min=low, max=high)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            module.eval(), example, dynamic_shapes=[{0: batch} for _ in example]
        )
        if form == "functional":
            program = program.run_decompositions({})
        elif form == "core":
            program = program.run_decompositions()
    return program


def saved(program: ExportedProgram, path: Path, **kwargs: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, **kwargs)
    return path


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {info.filename.split("/", 1)[1]: archive.read(info) for info in archive.infolist()}


def written(path: Path, entries: Entries, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"net/{name}", data)
    return path


def edited(entries: Entries, entry: str, change: Callable[[Any], Any]) -> Entries:
    """`entries` with the JSON document `entry` changed in place."""
    document = json.loads(entries[entry])
    change(document)
    return {**entries, entry: json.dumps(document).encode()}


def with_graph(entries: Entries, change: Callable[[Any], Any]) -> Entries:
    return edited(entries, "models/model.json", change)


def with_table(entries: Entries, folder: str, change: Callable[[Any], Any]) -> Entries:
    entry = f"data/{folder}/model_{folder}_config.json"
    return edited(entries, entry, lambda document: change(document["config"]))


def renamed(entries: Entries, old: str, new: str) -> Entries:
    """`entries` with one name replaced wherever it stands in a document, as key and as value."""
    before, after = json.dumps(old), json.dumps(new)
    return {
        name: data.decode().replace(before, after).encode() if name.endswith(".json") else data
        for name, data in entries.items()
    }


def pickled(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def read(path: Path, limits: Pt2Limits | None = None) -> Program:
    """As the service reads it: list, then load."""
    archive = read_checkpoint(path).archive
    assert archive is not None
    return load_pt2(archive.path, archive.places, limits)
