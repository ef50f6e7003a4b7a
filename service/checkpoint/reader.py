"""From an untrusted file to a checked state dict."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from service.checkpoint.archive import Archive, list_archive
from service.checkpoint.detect import Kind, detect
from service.checkpoint.hdf5_file import read_hdf5
from service.checkpoint.limits import ReadLimits, exceeded
from service.checkpoint.safetensors_file import read_safetensors
from service.checkpoint.torch_file import read_torch_legacy, read_torch_zip, refuse_bare_pickle
from service.checkpoint.unwrap import Weights, check_keys, unwrap
from service.checkpoint.weights import check_weights
from service.errors import NotACheckpoint

Container = Literal["safetensors", "torch-zip", "torch-legacy", "hdf5", "bundle", "pt2"]


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: key -> tensor on the CPU in the file's own dtype, detached, all finite.
        container: how it was stored. A "bundle" is a safetensors file that holds a program, a
            "pt2" an archive of torch.export.
        wrappers: what was taken off around the state dict, from the outside in, as in
            ("state_dict", "module.").
        bundle: the path of the file when it is a bundle, for `service.graph.load_program`.
        archive: the listed file when it is a pt2, for `service.graph.load_pt2`, which reads its
            weights; `state` is empty then.
    """

    state: dict[str, Tensor]
    container: Container
    wrappers: tuple[str, ...]
    bundle: Path | None
    archive: Archive | None = None


def read_checkpoint(
    path: Path, limits: ReadLimits | None = None, weights: Weights = "model"
) -> Checkpoint:
    """Read the state dict in the file at `path`, which nobody vouches for.

    What the file is follows from its bytes, never from its name. Nothing in it is imported,
    called or unpickled beyond plain tensors and containers, and every limit is checked before the
    memory is taken. `weights` chooses between plain weights and their moving average where a
    training checkpoint holds both.

    Raises the kinds of CheckpointError, each naming the key or the reason, and the remedy.
    """
    limits = limits or ReadLimits()
    length = path.stat().st_size
    if length > limits.file_bytes:
        raise exceeded(limits, "file_bytes", f"The file has {length} bytes")
    loaded: Any
    container: Container
    bundle = False
    match detect(path):
        case Kind.SAFETENSORS:
            loaded, bundle = read_safetensors(path, limits)
            container = "bundle" if bundle else "safetensors"
        case Kind.ZIP:
            archive = list_archive(path, limits)
            if archive.kind == "pt2":
                return Checkpoint({}, "pt2", (), None, archive)
            loaded, container = read_torch_zip(archive, limits), "torch-zip"
        case Kind.TORCH_LEGACY:
            loaded, container = read_torch_legacy(path, limits), "torch-legacy"
        case Kind.BARE_PICKLE:
            refuse_bare_pickle(path, limits)
        case Kind.HDF5:
            loaded, container = read_hdf5(path, limits), "hdf5"
    if bundle:
        check_keys(loaded, limits)
        check_weights(loaded)
        return Checkpoint(loaded, container, (), path)
    state, wrappers = unwrap(loaded, weights, limits)
    state = {key: tensor.detach() for key, tensor in state.items()}
    if any(type(tensor) is not Tensor for tensor in state.values()):
        raise NotACheckpoint("The state dict holds tensors of a class of its own.")
    check_weights(state)
    return Checkpoint(state, container, wrappers, None)
