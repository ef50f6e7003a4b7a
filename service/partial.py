"""Converting the known blocks of a network that is not known as a whole, key by key.

A detector's backbone is made of RepVGG or RepConv blocks, but its wiring is in a configuration file
that no checkpoint holds. Its blocks convert all the same, each with its own certificate; what comes
out is a deploy checkpoint under the project's keys, to be loaded by the project's code. It cannot
be served, because nobody here knows the graph.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from service.errors import CertificateFailed
from service.fusion import (
    BlockLayer,
    Certificate,
    Fusion,
    Totals,
    block_tensors,
    certify,
    fuse,
)
from service.graph import Program, trace
from service.networks import Part, blocks_of, build, deploy_skeleton
from service.networks.base import join


@dataclass(frozen=True)
class PartConversion:
    """One block: where it stands, how it was fused, and its tensors in the deploy form."""

    part: Part
    fusion: Fusion
    certificate: Certificate
    tensors: dict[str, Tensor]


def convert_parts(
    state: Mapping[str, Tensor],
    parts: tuple[Part, ...],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[PartConversion, ...]:
    """Fuse and certify every part of `state`.

    Blocks of equal hyper-parameters are traced once. Raises CertificateFailed naming the block.
    """
    programs: dict[str, Program] = {}
    conversions = []
    for index, part in enumerate(parts):
        module = build(part.recognition, part.state(state))
        program = _program(part, module, programs)
        fusion = fuse(program)
        certificate = certify(fusion)
        if not certificate.passed:
            raise CertificateFailed(
                f"{part.path}: {' '.join(certificate.failures)}",
                certificate=certificate.to_dict(),
            )
        tensors = deploy_tensors(module, fusion, part.recognition.public_key)
        conversions.append(PartConversion(part, fusion, certificate, tensors))
        if progress is not None:
            progress(index + 1, len(parts))
    return tuple(conversions)


def _program(part: Part, module: nn.Module, programs: dict[str, Program]) -> Program:
    """The block's program, traced for the first of its kind and given new weights for the others.

    Constants that the trace lifted belong to the kind, so they stay.
    """
    recognition = part.recognition
    kind = json.dumps([recognition.network, recognition.hyperparameters], sort_keys=True)
    if kind not in programs:
        programs[kind] = trace(module, (torch.zeros(2, *recognition.input_shape),))
        return programs[kind]
    own = module.state_dict()
    program = programs[kind]
    weights = {name: own.get(name, tensor) for name, tensor in program.weights.items()}
    return replace(program, weights=weights)


def deploy_tensors(
    module: nn.Module, fusion: Fusion, public_key: Callable[[str], str] = str
) -> dict[str, Tensor]:
    """The deploy form's state dict of `module`, whose program was fused.

    Kernels come from the same analysis as the served program; everything that stays keeps its key.
    `public_key` gives a key the name it has in the project that the upload came from.
    """
    fused = block_tensors(fusion.analysis, block_layers(module))
    with torch.device("meta"):
        wanted = deploy_skeleton(module).state_dict()
    own = module.state_dict()
    # A linear layer over the channels of a map is a 1x1 convolution to the engine.
    return {
        public_key(key): (fused[key].reshape(like.shape) if key in fused else own[key]).clone()
        for key, like in wanted.items()
    }


def block_layers(module: nn.Module) -> dict[str, BlockLayer]:
    """What the engine has to know about a network's blocks to make their deploy layers."""
    absorbed = {
        path: tuple(join(path, name) for name in getattr(part, "absorbed", ()))
        for path, part in module.named_modules()
    }
    return {
        path: BlockLayer(
            deploy=join(path, block.deploy_name),
            kept=tuple(join(path, child) for child in block.kept),
            absorbed=absorbed[path.rpartition(".")[0]],
        )
        for path, block in blocks_of(module)
    }


def merged_state(
    state: Mapping[str, Tensor], conversions: tuple[PartConversion, ...]
) -> dict[str, Tensor]:
    """`state` with every converted block's keys replaced by those of its deploy form."""
    gone = tuple(f"{conversion.part.path}." for conversion in conversions)
    merged = {key: tensor for key, tensor in state.items() if not key.startswith(gone)}
    for conversion in conversions:
        path = conversion.part.path
        merged.update({join(path, key): tensor for key, tensor in conversion.tensors.items()})
    return {key: tensor.contiguous().clone() for key, tensor in merged.items()}


def describe(state: Mapping[str, Tensor], conversions: tuple[PartConversion, ...]) -> str:
    """A name for people: how many blocks of which kinds."""
    kinds = Counter(conversion.part.recognition.name for conversion in conversions)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"unknown network with {counted}"


def total(conversions: tuple[PartConversion, ...]) -> Totals:
    """The blocks' numbers added up; MACs are of each block's own probe size."""
    totals = [conversion.fusion.report.totals for conversion in conversions]
    fields = Totals.__dataclass_fields__
    added: dict[str, Any] = {name: sum(getattr(t, name) for t in totals) for name in fields}
    return Totals(**added)
