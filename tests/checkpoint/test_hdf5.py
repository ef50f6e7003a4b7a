"""HDF5 checkpoints: what the ACNet project writes, and what HDF5 could do besides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from service.errors import (
    AliasBomb,
    CheckpointError,
    ExternalReference,
    FilteredDataset,
    LimitExceeded,
    NestingTooDeep,
    TensorOutOfRange,
    UnsafeName,
    UnsupportedContainer,
)
from tests.networks import cases

from . import forge


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    """As ACNet's `save_hdf5`: flat, a slash in a name spelt as a plus."""
    with h5py.File(path, "w") as file:
        for key, tensor in state.items():
            file.create_dataset(key.replace("/", "+"), data=tensor.numpy())
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "finish.hdf5"


def test_flat_files_hold_a_state_dict(path: Path) -> None:
    state = {**forge.small_state(), "a/b": torch.ones(2), "half": torch.ones(3).half()}
    found = forge.read(saved(path, state))
    assert (found.container, found.wrappers, found.bundle) == ("hdf5", (), None)
    assert forge.same(found.state, state)


def test_the_usual_way_of_a_state_dict_follows(path: Path) -> None:
    state = forge.small_state()
    found = forge.read(saved(path, {f"module.{key}": value for key, value in state.items()}))
    assert found.wrappers == ("module.",)
    assert forge.same(found.state, state)
    with pytest.raises(CheckpointError, match="NaN"):
        forge.read(saved(path, {"w": torch.tensor([1.0, float("nan")])}))


def test_groups_are_joined_with_dots_and_widths_left_out(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("stage1/conv/weight", data=np.ones((2, 3), ">f4"))
        file.create_dataset("deps", data=np.array([8, 16, 24]))
    state = forge.read(path).state
    assert state.keys() == {"stage1.conv.weight"}
    assert torch.equal(state["stage1.conv.weight"], torch.ones(2, 3))


def test_only_whole_numbers_named_deps_are_left_out(path: Path) -> None:
    assert "deps" in forge.read(saved(path, {"deps": torch.ones(2)})).state


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names("acnet_"))
def test_the_projects_networks_are_recognised_as_from_torch(path: Path, name: str) -> None:
    state = cases.state_of(name)
    found = forge.read(saved(path, state))
    assert forge.same(found.state, state)
    config = cases.config_of(name)
    assert cases.recognise(found.state, config) == cases.recognise(state, config)


def _soft_link(file: Any) -> None:
    file["w"] = h5py.SoftLink("/ok")


def _external_link(file: Any) -> None:
    file["w"] = h5py.ExternalLink("other.hdf5", "/secret")


def _external_bytes(file: Any) -> None:
    file.create_dataset("w", (4,), "f4", external=[("secret.bin", 0, 16)])


def _virtual(file: Any) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.hdf5", "secret", (4,))
    file.create_virtual_dataset("w", layout)


def _never_written(file: Any) -> None:
    file.create_dataset("w", (10_000_000_000,), "f4")


def _ring(file: Any) -> None:
    file.create_group("a")["b"] = file["/"]


def _many_names(file: Any) -> None:
    file.create_dataset("w0", data=np.ones(4096, "f4"))
    for index in range(1, 100):
        file[f"w{index}"] = file["w0"]


def _deep(file: Any) -> None:
    file.create_dataset("/".join("a" * 40), data=np.ones(1))


def _text(file: Any) -> None:
    file.create_dataset("w", data=["a", "bb"], dtype=h5py.string_dtype())


def _references(file: Any) -> None:
    file.create_dataset("w", data=[file["ok"].ref], dtype=h5py.ref_dtype)


def _odd_enum(file: Any) -> None:
    kind = h5py.enum_dtype({"RED": 0, "BLUE": 70}, basetype="i8")
    file.create_dataset("w", data=np.zeros(2, kind), dtype=kind)


HOSTILE: list[tuple[Callable[[Any], Any], type[CheckpointError], str]] = [
    (_soft_link, ExternalReference, "'w'.*link"),
    (_external_link, ExternalReference, "'w'.*link"),
    (_external_bytes, ExternalReference, "'w'.*another file"),
    (_virtual, ExternalReference, "'w'.*virtual"),
    (_never_written, TensorOutOfRange, "'w' needs 40000000000 bytes; the file has 0"),
    (_ring, NestingTooDeep, "contains itself"),
    (_many_names, AliasBomb, "tensor_expansion"),
    (_deep, NestingTooDeep, "too deep"),
    (_text, UnsupportedContainer, "does not hold numbers"),
    (_references, UnsupportedContainer, "does not hold numbers"),
    (lambda f: f.create_dataset("w", data=h5py.Empty("f4")), UnsupportedContainer, "no shape"),
    (
        lambda f: f.create_dataset("w", data=np.zeros(2, [("a", "f4")])),
        UnsupportedContainer,
        "does not hold numbers",
    ),
    (lambda f: f.create_dataset("w", data=np.ones(2, "c8")), UnsupportedContainer, "numbers"),
    (lambda f: f.create_dataset("w", data=np.ones(2, "f16")), UnsupportedContainer, "float128"),
    (lambda f: f.create_dataset("w", data=np.ones(2, "u8")), UnsupportedContainer, "uint64"),
    (
        lambda f: f.create_dataset("w", data=np.zeros(10**6, "f4"), compression="gzip"),
        FilteredDataset,
        "compressed",
    ),
    (
        lambda f: f.create_dataset("w", data=np.zeros(8, "f4"), chunks=(4,)),
        FilteredDataset,
        "chunked",
    ),
    (lambda f: f.create_dataset("k" * 600, data=np.ones(1)), LimitExceeded, "key_characters"),
    (lambda f: f.create_dataset("a\nb", data=np.ones(1)), UnsafeName, "cannot be shown"),
    (lambda f: f.__setitem__("w", np.dtype("f4")), UnsupportedContainer, "neither"),
]


@pytest.mark.parametrize(("make", "kind", "says"), HOSTILE)
def test_everything_but_plain_arrays_is_refused(
    path: Path,
    make: Callable[[Any], Any],
    kind: type[CheckpointError],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(path.parent)  # where relative names of other files would be looked up
    Path("secret.bin").write_bytes(np.ones(4, "f4").tobytes())
    with h5py.File("other.hdf5", "w") as other:
        other.create_dataset("secret", data=np.ones(4, "f4"))
    with h5py.File(path, "w") as file:
        file.create_dataset("ok", data=np.ones(4, "f4"))
    assert forge.read(path).state.keys() == {"ok"}  # without the trick it is read
    with h5py.File(path, "a") as file:
        make(file)
    with pytest.raises(kind, match=says) as raised:
        forge.read(path)
    assert type(raised.value) is kind
    assert raised.value.remedy


@pytest.mark.parametrize("make", [_external_link, _external_bytes, _virtual])
def test_the_tricks_do_reach_other_files(
    path: Path, make: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above: a reader that does not look first reads the secret."""
    monkeypatch.chdir(path.parent)
    Path("secret.bin").write_bytes(np.ones(4, "f4").tobytes())
    with h5py.File("other.hdf5", "w") as other:
        other.create_dataset("secret", data=np.ones(4, "f4"))
    with h5py.File(path, "w") as file:
        make(file)
    with h5py.File(path, "r") as file:
        assert np.array_equal(file["w"][()], np.ones(4, "f4"))


def test_limits_count_links_and_files(path: Path) -> None:
    state = {str(index): torch.ones(1) for index in range(20)}
    saved(path, state)
    assert len(forge.read(path, tensors=20).state) == 20
    with pytest.raises(LimitExceeded, match="tensors"):
        forge.read(path, tensors=19)


def test_cut_and_damaged_files_are_refused_or_read_right(path: Path) -> None:
    state = {"w": torch.arange(512.0), "v": torch.ones(3)}
    data = saved(path, state).read_bytes()
    for end in range(8, len(data), 97):
        path.write_bytes(data[:end])
        with pytest.raises(CheckpointError):
            forge.read(path)
    generator = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data)
        broken[int(generator.integers(8, len(data)))] ^= 1 << int(generator.integers(8))
        path.write_bytes(broken)
        try:
            found = forge.read(path).state
        except CheckpointError:
            continue
        assert sum(t.numel() * t.element_size() for t in found.values()) <= 2 * len(data)
