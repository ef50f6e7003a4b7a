"""Whole files: every container comes back as it was saved, everything else is told apart."""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
import random
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from service.checkpoint import read_checkpoint
from service.checkpoint.safetensors_file import BUNDLE_KEY
from service.errors import (
    CheckpointError,
    EmptyFile,
    LimitExceeded,
    NotACheckpoint,
    TorchScriptArchive,
    TruncatedFile,
    UnsupportedContainer,
)
from service.graph import save_program, trace

from . import forge


@pytest.mark.parametrize("name", ["net.pth", "net.txt", "net.safetensors", "net"])
def test_the_name_says_nothing(tmp_path: Path, name: str) -> None:
    state = forge.small_state()
    found = forge.read(forge.saved(tmp_path / name, state))
    assert (found.container, found.wrappers, found.bundle) == ("torch-zip", (), None)
    assert forge.same(found.state, state)


def test_every_container_gives_the_same_state(tmp_path: Path) -> None:
    state = forge.small_state()
    safetensors.torch.save_file(state, tmp_path / "c")
    for path, container in (
        (forge.saved(tmp_path / "a", state), "torch-zip"),
        (forge.saved_legacy(tmp_path / "b", state), "torch-legacy"),
        (tmp_path / "c", "safetensors"),
    ):
        found = forge.read(path)
        assert found.container == container
        assert forge.same(found.state, state)


@pytest.mark.parametrize("save", [forge.saved, forge.saved_legacy])
def test_tensors_of_every_kind_come_back(tmp_path: Path, save: object) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        **{
            str(dtype): torch.ones(3).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)
        },
        "view": base[1:3, ::2],
        "transposed": base.t(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    found = forge.read(save(tmp_path / "net", state)).state  # type: ignore[operator]
    assert forge.same(found, {key: value.detach() for key, value in state.items()})
    assert not any(value.requires_grad for value in found.values())
    assert all(type(value) is torch.Tensor for value in found.values())


def test_what_scripts_save_beside_the_weights_does_no_harm(tmp_path: Path) -> None:
    counts: defaultdict[str, int] = defaultdict(int)
    counts["seen"] = 3
    content = {
        "state_dict": nn.Conv2d(1, 1, 1).state_dict(),
        "args": argparse.Namespace(lr=0.1, milestones=[1, 2], nested=argparse.Namespace()),
        "best_acc1": np.float64(71.5),
        "history": np.zeros(3),
        "folder": Path("runs/1"),
        "counts": counts,
        "epoch": 119,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{}]},
    }
    for save in (forge.saved, forge.saved_legacy):
        found = forge.read(save(tmp_path / "net", content))
        assert found.wrappers == ("state_dict",)
        assert list(found.state) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_a_bundle_is_passed_through(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    path = tmp_path / "bundle"
    save_program(trace(net, (torch.randn(2, 3, 8, 8),)), path)
    found = read_checkpoint(path)
    assert (found.container, found.bundle) == ("bundle", path)
    assert found.state


def test_the_bundle_key_alone_makes_a_bundle(tmp_path: Path) -> None:
    for metadata, container in (({BUNDLE_KEY: "{}"}, "bundle"), ({"x": "{}"}, "safetensors")):
        safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "f", metadata=metadata)
        assert forge.read(tmp_path / "f").container == container


def _npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def _npy() -> bytes:
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        file.addfile(tarfile.TarInfo("net.pth"))
    return out.getvalue()


def _zip(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (b"", EmptyFile, "no bytes"),
        (b"hello, this is my network\n", NotACheckpoint, "is text"),
        ("ein Text, größer\n".encode() * 60, NotACheckpoint, "is text"),
        (b'{"weights": [1, 2]}', NotACheckpoint, "JSON"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", NotACheckpoint, "HTML"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            NotACheckpoint,
            "Git LFS pointer",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), NotACheckpoint, "PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(50), NotACheckpoint, "JPEG"),
        (b"\x7fELF" + bytes(50), NotACheckpoint, "executable"),
        (bytes(64), NotACheckpoint, "00 00"),
        (bytes(range(200, 256)), NotACheckpoint, "c8 c9"),
        (b"\x80", NotACheckpoint, "80"),
        (gzip.compress(b"x" * 100, mtime=0), UnsupportedContainer, "gzip"),
        (_tar(), UnsupportedContainer, "tar"),
        (_npy(), UnsupportedContainer, "numpy array"),
        (_npz(a=np.zeros(2), b=np.ones(3)), UnsupportedContainer, "numpy archive"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), NotACheckpoint, "HDF5"),
        (b"GGUF" + bytes(100), UnsupportedContainer, "GGUF"),
        (_zip(), NotACheckpoint, "empty zip"),
        (_zip("word/document.xml"), NotACheckpoint, "not one that torch.save wrote"),
        (_zip("net/data.pkl", "net/constants.pkl"), TorchScriptArchive, "TorchScript"),
        (_zip("net/data.pkl", "net/code/__torch__.py"), TorchScriptArchive, "TorchScript"),
        (_zip("e/models/model.json"), UnsupportedContainer, "torch.export"),
        (_zip("serialized_exported_program.json"), UnsupportedContainer, "torch.export"),
        (pickle.dumps({"w": [1, 2]}), UnsupportedContainer, "plain pickle"),
        (pickle.dumps({"w": [1, 2]}, protocol=2), UnsupportedContainer, "plain pickle"),
    ],
)
def test_everything_else_is_told_what_it_is(
    tmp_path: Path, data: bytes, kind: type[CheckpointError], says: str
) -> None:
    with pytest.raises(kind, match=says) as raised:
        forge.read(forge.written(tmp_path / "net.pth", data))
    assert type(raised.value) is kind
    assert raised.value.remedy


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_a_real_export_archive_is_listed(tmp_path: Path) -> None:
    net = nn.Conv2d(1, 1, 1).eval()
    image = torch.ones(1, 1, 4, 4)
    torch.export.save(torch.export.export(net, (image,)), tmp_path / "net.pt2")
    found = forge.read(tmp_path / "net.pt2")
    assert (found.container, found.state, found.bundle) == ("pt2", {}, None)
    assert found.archive is not None
    assert "models/model.json" in found.archive.places


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_every_cut_of_a_file_is_refused(tmp_path: Path, container: str) -> None:
    state = forge.small_state()
    path = tmp_path / "net"
    if container == "zip":
        forge.saved(path, state)
    elif container == "legacy":
        forge.saved_legacy(path, state)
    else:
        safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    kinds = set()
    for length in {1, 7, 8, 9, 20, 100, len(whole) // 2, *range(len(whole) - 70, len(whole))}:
        with pytest.raises(CheckpointError) as raised:
            forge.read(forge.written(path, whole[:length]))
        kinds.add(type(raised.value))
    assert kinds <= {TruncatedFile, NotACheckpoint}
    assert TruncatedFile in kinds
    forge.read(forge.written(path, whole))


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_no_mutation_does_more_than_be_refused(tmp_path: Path, container: str) -> None:
    """Flipped, cut, repeated and overwritten bytes: a state dict or a CheckpointError, only."""
    state = forge.small_state()
    path = tmp_path / "net"
    if container == "zip":
        forge.saved(path, OrderedDict(state))
    elif container == "legacy":
        forge.saved_legacy(path, OrderedDict(state))
    else:
        safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    chance = random.Random(7)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            where = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[where] ^= 1 << chance.randrange(8)
                case 1:
                    data[where] = chance.choice(b"\0\1\x7f\x80\xff(.Rb0KMJXcQ")
                case 2:
                    del data[where : where + chance.randint(1, 40)]
                case _:
                    data[where:where] = data[where : where + chance.randint(1, 40)]
        try:
            forge.read(forge.written(path, bytes(data)))
        except CheckpointError:
            refused += 1
    assert refused > 100, "the mutations were too mild to prove anything"


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7])
def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path, where: float) -> None:
    path = forge.saved(tmp_path / "net", {"w": torch.ones(10_000)})
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    with pytest.raises(NotACheckpoint, match="checksum"):
        forge.read(forge.written(path, bytes(data)))


def test_a_file_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        forge.saved(tmp_path / "net", forge.small_state())
    finally:
        torch.serialization.set_crc32_options(True)
    assert forge.same(forge.read(tmp_path / "net").state, forge.small_state())


def test_a_file_over_the_size_limit_is_refused(tmp_path: Path) -> None:
    path = forge.saved(tmp_path / "net", forge.small_state())
    length = path.stat().st_size
    forge.read(path, file_bytes=length)
    with pytest.raises(LimitExceeded, match="file_bytes") as raised:
        forge.read(path, file_bytes=length - 1)
    assert "FOLDSERVE_MAX_UPLOAD_BYTES" in raised.value.remedy
