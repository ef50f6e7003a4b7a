"""The way of a checkpoint, one function a stage.

    read -> recognise -> build -> fuse -> certify -> write

All of it runs in the conversion's child process (or in `foldserve convert`), on files: no store, no
HTTP. Each stage returns its result or raises one of `service.errors`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from service import partial
from service.checkpoint import Checkpoint, ReadLimits, read_checkpoint
from service.checkpoint.archive import Archive
from service.checkpoint.weights import check_weights
from service.errors import CertificateFailed, InvalidConfig, InvalidProgram, UnknownArchitecture
from service.fusion import (
    Certificate,
    Fusion,
    Totals,
    certify,
    fuse,
    quantisation_report,
    ranges_to_dict,
    report_text,
)
from service.graph import Program, Pt2Limits, load_program, load_pt2, save_program, trace
from service.networks import (
    ModelConfig,
    Part,
    Recognition,
    build,
    find_parts,
    recognise,
)

STAGES = ("read", "recognise", "build", "fuse", "certify", "write")
"""Stages of `convert` in order, as progress reports name them."""

Progress = Callable[[Mapping[str, Any]], None]
"""Told `{"stage": …, "done": …, "total": …}`; blocks are counted while certifying."""


@dataclass(frozen=True)
class Network:
    """A network ready to be fused: its program and what is known about it.

    `module` and `recognition` are None for a bundle, whose architecture nobody needs to know, and
    `module` for another library's network, whose deploy form is that of the program.
    """

    program: Program
    form: str
    architecture: dict[str, Any]
    module: nn.Module | None = None
    recognition: Recognition | None = None


@dataclass(frozen=True)
class Conversion:
    """What a conversion publishes. `files` maps artifact kinds to files in the scratch folder.

    Without a `deploy_program` the version can be downloaded, not served: see `service.partial`.

    `train_program` (absent when a deploy form was uploaded) and `deploy_program` are bundles,
    `deploy_checkpoint` is a safetensors file under the official deploy keys, `report` is JSON.
    """

    form: str
    architecture: dict[str, Any]
    fusion: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)


def convert(
    source: Path,
    config: ModelConfig,
    scratch: Path,
    progress: Progress | None = None,
    limits: ReadLimits | None = None,
) -> Conversion:
    """Walk the whole way for the checkpoint at `source`, leaving results in `scratch`.

    Raises CheckpointError, RecognitionError, GraphError or FusionError kinds; CertificateFailed
    carries the certificate's numbers.
    """

    def report(stage: str, done: int = 0, total: int = 1) -> None:
        if progress is not None:
            progress({"stage": stage, "done": done, "total": total})

    report("read")
    checkpoint = read_checkpoint(source, limits, config.weights)
    report("recognise")
    try:
        network = understand(checkpoint, config, lambda: report("build"), limits)
    except UnknownArchitecture:
        parts = find_parts(checkpoint.state, config)
        if not parts:
            raise
        return _convert_parts(checkpoint, parts, scratch, report)
    report("fuse")
    fusion = fuse(network.program)
    total = len(fusion.regions)
    report("certify", 0, total)
    certificate = certify(fusion, progress=lambda done, of: report("certify", done, of))
    if not certificate.passed:
        raise CertificateFailed(
            " ".join(certificate.failures), certificate=_certificate_summary(certificate)
        )
    report("write")
    files = write(network, checkpoint, fusion, certificate, scratch)
    return Conversion(
        form=network.form,
        architecture=network.architecture,
        fusion=summary(fusion, certificate),
        files={kind: str(path) for kind, path in files.items()},
    )


def _convert_parts(
    checkpoint: Checkpoint,
    parts: tuple[Part, ...],
    scratch: Path,
    report: Callable[[str, int, int], None],
) -> Conversion:
    """Known blocks of an unknown network: a deploy checkpoint, but nothing that could be served."""
    conversions = partial.convert_parts(
        checkpoint.state, parts, lambda done, of: report("certify", done, of)
    )
    report("write", 0, 1)
    architecture: dict[str, Any] = {
        "family": "blocks",
        "name": partial.describe(checkpoint.state, conversions),
        "num_classes": None,
        "input_shape": None,
        "hyperparameters": {},
        "evidence": [f"`{c.part.path}` is a {c.part.recognition.name}." for c in conversions],
        "assumed": sorted({s for c in conversions for s in c.part.recognition.assumed}),
        "dropped": [],
        "container": checkpoint.container,
        "wrappers": list(checkpoint.wrappers),
    }
    worst = max(conversions, key=lambda c: c.certificate.error_end_to_end).certificate
    error = max(c.certificate.error_float64 for c in conversions)
    fusion = {**_numbers(partial.total(conversions), worst), "error_float64": error}
    files = {"report": scratch / "report.json", "deploy_checkpoint": scratch / "deploy.safetensors"}
    state = partial.merged_state(checkpoint.state, conversions)
    save_file(state, files["deploy_checkpoint"], metadata={"format": "pt"})
    document = {
        "architecture": architecture,
        "blocks": [
            {"path": c.part.path, "certificate": c.certificate.to_dict(), **block}
            for c in conversions
            for block in c.fusion.report.to_dict()["blocks"]
        ],
    }
    files["report"].write_text(json.dumps(document, indent=1))
    return Conversion(
        "train", architecture, fusion, {kind: str(path) for kind, path in files.items()}
    )


def understand(
    checkpoint: Checkpoint,
    config: ModelConfig,
    building: Callable[[], None] | None = None,
    limits: ReadLimits | None = None,
) -> Network:
    """Recognise and build the network of a checkpoint, or take the program that it brings."""
    if checkpoint.bundle is not None:
        return _bundled(load_program(checkpoint.bundle), config)
    if checkpoint.archive is not None:
        return _bundled(exported(checkpoint.archive, limits or ReadLimits()), config, "pt2")
    recognition = recognise(checkpoint.state, config)
    if building is not None:
        building()
    module = build(recognition, checkpoint.state)
    program = trace(module, (torch.zeros(2, *recognition.input_shape),))
    architecture = {
        "family": recognition.family,
        "name": recognition.name,
        "num_classes": recognition.num_classes,
        "input_shape": list(recognition.input_shape),
        "hyperparameters": recognition.hyperparameters,
        "evidence": list(recognition.evidence),
        "assumed": list(recognition.assumed),
        "dropped": list(recognition.dropped),
        "container": checkpoint.container,
        "wrappers": list(checkpoint.wrappers),
    }
    own = None if recognition.foreign else module
    return Network(program, recognition.form, architecture, own, recognition)


def exported(archive: Archive, limits: ReadLimits) -> Program:
    """The program of a torch.export archive, its weights checked as a checkpoint's are."""
    own = Pt2Limits(**{item.name: getattr(limits, item.name) for item in fields(Pt2Limits)})
    program = load_pt2(archive.path, archive.places, own)
    check_weights(program.weights)
    return program


def _bundled(program: Program, config: ModelConfig, container: str = "bundle") -> Network:
    if config.architecture is not None:
        raise InvalidConfig(
            f"`architecture` is given, but a {container} brings its own program.",
            field="architecture",
        )
    for spec in program.inputs:
        if not spec.shape or spec.shape[0] is not None or None in spec.shape[1:]:
            raise InvalidProgram(f"The input {spec.name!r} needs a batch axis and fixed sizes.")
    if not program.inputs:
        raise InvalidProgram("The program has no input.")
    specs = program.specs()
    outputs = [specs[name].shape for name in program.outputs]
    several = f"{_counted(program.inputs, 'input')} and {_counted(outputs, 'output')}"
    architecture: dict[str, Any] = {
        "family": "program",
        "name": container,
        "num_classes": outputs[0][1] if len(outputs) == 1 and len(outputs[0]) == 2 else None,
        "input_shape": list(program.inputs[0].shape[1:]),
        "hyperparameters": {},
        "evidence": [
            f"The file is a {container} of {len(program.nodes)} operators with {several}."
        ],
        "assumed": [],
        "dropped": [],
        "container": container,
        "wrappers": [],
    }
    return Network(program, "train", architecture)


def _counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}" if len(things) == 1 else f"{len(things)} {name}s"


def write(
    network: Network,
    checkpoint: Checkpoint,
    fusion: Fusion,
    certificate: Certificate,
    scratch: Path,
) -> dict[str, Path]:
    """Write every artifact of a conversion into `scratch`; returns kind -> path."""
    files = {"deploy_program": scratch / "deploy.bundle", "report": scratch / "report.json"}
    save_program(fusion.program, files["deploy_program"])
    if network.form == "train":
        files["train_program"] = scratch / "train.bundle"
        save_program(network.program, files["train_program"])
    files["deploy_checkpoint"] = scratch / "deploy.safetensors"
    state = deploy_state(network, checkpoint.state, fusion)
    save_file(state, files["deploy_checkpoint"], metadata={"format": "pt"})
    document = {
        "architecture": network.architecture,
        "certificate": certificate.to_dict(),
        **fusion.report.to_dict(),
        "quantisation": ranges_to_dict(quantisation_report(fusion)),
    }
    errors = {check.module: check.error for check in certificate.regions}
    for block in document["blocks"]:
        block["error_float64"] = errors.get(block["module"])
    files["report"].write_text(json.dumps(document, indent=1))
    return files


def read_report(path: Path) -> tuple[dict[str, Any], str]:
    """A conversion's report as it was written, and as text for people."""
    document: dict[str, Any] = json.loads(path.read_text())
    return document, report_text(document)


def deploy_state(
    network: Network, state: Mapping[str, Tensor], fusion: Fusion
) -> dict[str, Tensor]:
    """The deploy form's state dict: official keys where the family has them, else the program's.

    Kernels come from the same analysis as the served program; everything that stays keeps its key.
    """
    if network.module is None:
        return {name: tensor.contiguous() for name, tensor in fusion.program.weights.items()}
    named = network.recognition.public_key if network.recognition is not None else str
    if network.form == "deploy":
        own = network.module.state_dict()
        return {named(key): tensor.contiguous().clone() for key, tensor in own.items()}
    return partial.deploy_tensors(network.module, fusion, named)


def summary(fusion: Fusion, certificate: Certificate) -> dict[str, Any]:
    """The numbers that a version's resource shows; MACs are of one sample, bytes of weights."""
    return _numbers(fusion.report.totals, certificate)


def _numbers(totals: Totals, certificate: Certificate) -> dict[str, Any]:
    return {
        "blocks": totals.blocks,
        "fused": totals.fused,
        "kept": totals.kept,
        "refused": totals.refused,
        "convolutions_before": totals.convolutions_before,
        "convolutions_after": totals.convolutions_after,
        "macs_before": totals.macs_before,
        "macs_after": totals.macs_after,
        "parameters_before": totals.parameters_before,
        "parameters_after": totals.parameters_after,
        "bytes_before": totals.bytes_before,
        "bytes_after": totals.bytes_after,
        "error_float64": certificate.error_float64,
        "error_end_to_end": certificate.error_end_to_end,
        "certificate": _certificate_summary(certificate),
    }


def _certificate_summary(certificate: Certificate) -> dict[str, Any]:
    numbers = certificate.to_dict()
    del numbers["regions"]
    return numbers


def save_as_torch(safetensors: Path, target: Path) -> None:
    """Rewrite a safetensors state dict as torch.save writes it (`.pth`)."""
    torch.save(load_file(safetensors), target)
