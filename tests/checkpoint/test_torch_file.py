"""Forged and limited files of torch.save. Each trick has its honest neighbour beside it."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from service.errors import (
    CheckpointError,
    LimitExceeded,
    NestingTooDeep,
    NotACheckpoint,
    TensorOutOfRange,
    TruncatedFile,
    UnsafePickle,
    UnsupportedContainer,
    WholeModulePickle,
)

from . import forge
from .forge import MIB, archive, global_, integer, state_pickle, storage, tensor, text, tuple_


class Evil:
    """Pickles as a call of os.system."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch owned",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.pth"


def one_tensor(size: list[int], stride: list[int], count: int, offset: int = 0) -> bytes:
    return state_pickle({"w": tensor(storage("0", count), size, stride, offset)})


def test_the_forge_makes_what_torch_makes(path: Path) -> None:
    data = torch.arange(6.0)
    archive(path, one_tensor([2, 3], [3, 1], 6), {"0": data.numpy().tobytes()})
    assert torch.equal(forge.read(path).state["w"], data.reshape(2, 3))
    assert torch.equal(torch.load(path, weights_only=True)["w"], data.reshape(2, 3))
    main = state_pickle({"w": tensor(storage("0", 6, legacy=True), [2, 3], [3, 1])})
    forge.legacy(path, main, ["0"], struct.pack("<q", 6) + data.numpy().tobytes())
    assert torch.equal(forge.read(path).state["w"], data.reshape(2, 3))


@pytest.mark.parametrize("save", [forge.saved, forge.saved_legacy])
def test_a_forbidden_global_is_named_and_never_run(
    path: Path, save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(UnsafePickle, match=r"posix\.system") as raised:
        forge.read(save(path, {"state_dict": {"w": torch.ones(1)}, "x": Evil()}))
    assert type(raised.value) is UnsafePickle
    assert raised.value.extra["globals"] == ["posix.system"]
    assert "state_dict()" in raised.value.remedy
    assert not (path.parent / "owned").exists()


@pytest.mark.parametrize("save", [forge.saved, forge.saved_legacy])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_pickled_module_is_told_apart(path: Path, save: Any) -> None:
    with pytest.raises(WholeModulePickle, match=r"torch\.nn\.modules\.conv\.Conv2d") as raised:
        forge.read(save(path, {"model": nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())}))
    assert "state_dict" in raised.value.remedy


@pytest.mark.parametrize("protocol", range(6))
def test_bare_pickles_of_every_protocol_are_walked(path: Path, protocol: int) -> None:
    forge.written(path, pickle.dumps([Evil()], protocol=protocol))
    expected = UnsafePickle if protocol >= 2 else NotACheckpoint  # 0 and 1 have no mark of a pickle
    with pytest.raises(expected) as raised:
        forge.read(path)
    assert protocol < 2 or raised.value.extra["globals"] == ["posix.system"]
    forge.written(path, pickle.dumps(nn.Conv2d(1, 1, 1), protocol=max(protocol, 2)))
    with pytest.raises(WholeModulePickle):
        forge.read(path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_in_a_torch_file_are_refused_with_the_remedy(
    path: Path, protocol: int
) -> None:
    forge.saved(path, {"w": torch.ones(1), "t": b"bytes"}, pickle_protocol=protocol)
    with pytest.raises(UnsupportedContainer) as raised:
        forge.read(path)
    assert "pickle_protocol" in raised.value.remedy


CALLS = {
    "a huge bytearray": global_("builtins", "bytearray") + tuple_([integer(1 << 40)]) + b"R",
    "a slow codec": global_("_codecs", "encode") + tuple_([text("x"), text("idna")]) + b"R",
    "a tensor without its constructor": global_("torch", "Tensor")
    + tuple_([integer(1 << 40)])
    + b"\x81",
    "a storage by call": global_("torch", "FloatStorage") + tuple_([integer(1 << 40)]) + b"R",
    "a storage by new": global_("torch", "FloatStorage") + tuple_([integer(1 << 40)]) + b"\x81",
    "a wrapper subclass": global_("torch._utils", "_rebuild_wrapper_subclass") + b")R",
    "a sparse tensor": global_("torch._utils", "_rebuild_sparse_tensor") + b")R",
    "an extension code": b"\x82\x01",
    "a tensor's state": tensor(storage("0", 6), [2], [1])
    + tuple_([storage("0", 6), integer(0), tuple_([integer(1 << 40)]), tuple_([integer(0)])])
    + b"b",
    "a persistent name": b"Pstorage\n",
    "a persistent number": integer(1) + b"Q",
    "a counter": global_("collections", "Counter") + b")R",
    "a call of a string": text("x") + b")R",
    "a negative size": tensor(storage("0", 6), [-1], [1]),
    "a negative stride": tensor(storage("0", 6), [2], [-1]),
    "a negative offset": tensor(storage("0", 6), [2], [1], -1),
    "a negative storage": tensor(storage("0", -6), [0], [1]),
    "more sizes than strides": tensor(storage("0", 6), [2, 2], [1]),
    "a size of 2**70": tensor(storage("0", 6), [1 << 70], [1]),
    "a missing memo": b"h\x07",
    "an empty stack": b"\x86",
}


@pytest.mark.parametrize("what", CALLS)
def test_calls_that_torch_would_make_are_refused(path: Path, what: str) -> None:
    with pytest.raises(CheckpointError):
        forge.read(archive(path, state_pickle({"w": CALLS[what]}), {"0": bytes(24)}))


def test_a_storage_that_claims_more_than_its_record_is_refused(path: Path) -> None:
    record = {"0": bytes(400)}
    forge.read(archive(path, one_tensor([100], [1], 100), record))
    with pytest.raises(TensorOutOfRange, match="claims 404 bytes; its record has 400"):
        forge.read(archive(path, one_tensor([100], [1], 101), record))


def test_a_storage_without_a_record_is_refused(path: Path) -> None:
    with pytest.raises(TruncatedFile, match="no record"):
        forge.read(archive(path, one_tensor([100], [1], 100), {"1": bytes(400)}))


def test_a_storage_may_not_be_two_things(path: Path) -> None:
    twice = {
        "a": tensor(storage("0", 100), [1], [1]),
        "b": tensor(storage("0", 50, "DoubleStorage"), [1], [1]),
    }
    with pytest.raises(NotACheckpoint, match="contradicts"):
        forge.read(archive(path, state_pickle(twice), {"0": bytes(400)}))


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [([101], [1], 0), ([100], [1], 1), ([2], [100], 0), ([10, 10], [10, 2], 0), ([1], [1], 100)],
)
def test_a_view_beyond_its_storage_is_refused(
    path: Path, size: list[int], stride: list[int], offset: int
) -> None:
    with pytest.raises(TensorOutOfRange, match="reaches element"):
        forge.read(archive(path, one_tensor(size, stride, 100, offset), {"0": bytes(400)}))


def test_a_tiny_file_that_claims_40_gigabytes_is_refused(path: Path) -> None:
    archive(path, one_tensor([10**10], [0], 1), {"0": bytes(4)})
    assert path.stat().st_size < 1300
    with pytest.raises(LimitExceeded, match="tensor_expansion"):
        forge.read(path)


def test_tensors_that_share_one_storage_are_summed(path: Path) -> None:
    part = tensor(storage("0", MIB), [MIB], [1])
    record = {"0": bytes(4 * MIB)}
    forge.read(archive(path, state_pickle({"a": part, "tied": part}), record))
    with pytest.raises(LimitExceeded, match="tensor_expansion"):
        forge.read(archive(path, state_pickle({str(i): part for i in range(5)}), record))
    forge.read(path, tensor_expansion=5.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("archive_entries", 4), ("pickle_bytes", 100), ("tensors", 1)],
)
def test_each_limit_is_a_field_and_names_its_setting(path: Path, name: str, value: int) -> None:
    entries = {str(i): tensor(storage(str(i), 1), [1], [1]) for i in range(2)}
    archive(path, state_pickle(entries), {str(i): bytes(4) for i in range(2)})
    forge.read(path)
    with pytest.raises(LimitExceeded, match=f"{name} is {value}") as raised:
        forge.read(path, **{name: value})
    assert f"FOLDSERVE_READER_{name.upper()}" in raised.value.remedy


def test_long_pickles_and_long_keys_are_refused(path: Path) -> None:
    forge.saved(path, {"k" * 40: torch.ones(1), "list": [0] * 1000})
    forge.read(path)
    with pytest.raises(LimitExceeded, match="pickle_operations"):
        forge.read(path, pickle_operations=900)
    with pytest.raises(LimitExceeded, match="key_characters"):
        forge.read(path, key_characters=39)


def test_a_legacy_pickle_has_the_same_limit(path: Path) -> None:
    forge.saved_legacy(path, {"w": torch.ones(1), "list": ["x" * 100] * 10})
    forge.read(path)
    with pytest.raises(LimitExceeded, match="pickle_bytes"):
        forge.read(path, pickle_bytes=300)


@pytest.mark.parametrize(
    "nested", [lambda n: b"N" + b"\x85" * n, lambda n: b"]" * n + b"a" * (n - 1)]
)
def test_nesting_has_a_limit(path: Path, nested: Callable[[int], bytes]) -> None:
    def read(levels: int) -> None:
        entries = {"w": tensor(storage("0", 1), [1], [1]), "x": nested(levels)}
        archive(path, state_pickle(entries), {"0": bytes(4)})
        assert list(forge.read(path, nesting=50).state) == ["w"]

    read(49)  # the state dict itself is the fiftieth
    for levels in (50, 200_000):
        with pytest.raises(NestingTooDeep, match="nesting is 50"):
            read(levels)


def test_compressed_entries_are_refused(path: Path) -> None:
    content = one_tensor([1000], [1], 1000)
    archive(path, content, {"0": os.urandom(4000)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedContainer, match="compressed"):
        forge.read(path)
    archive(path, content, {"0": bytes(64 * MIB)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 80_000
    with pytest.raises(LimitExceeded, match="archive_expansion"):
        forge.read(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "archive/../x",
        "/archive/x",
        "archive//x",
        "archive/a\\b",
        "archive/c:x",
        "x",
        "a\t/b",
    ],
)
def test_odd_entry_names_are_refused(path: Path, name: str) -> None:
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)}, extra=[(name, b"x")])
    with pytest.raises(NotACheckpoint):
        forge.read(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(path: Path) -> None:
    extra = [("archive/data.pkl", b"\x80\x02}.")]
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)}, extra=extra)
    with pytest.raises(NotACheckpoint, match="twice"):
        forge.read(path)


def test_a_second_top_folder_is_refused(path: Path) -> None:
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)}, extra=[("other/data.pkl", b"x")])
    with pytest.raises(NotACheckpoint, match="top folders"):
        forge.read(path)


@pytest.mark.parametrize("where", ["before", "after", "inside"])
def test_bytes_that_the_directory_does_not_list_are_refused(path: Path, where: str) -> None:
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)})
    whole = path.read_bytes()
    if where == "before":
        data = b"PK\x03\x04" + bytes(60) + whole
    elif where == "after":
        data = whole + bytes(60)
    else:
        with zipfile.ZipFile(path, "a") as file:
            file.start_dir += 60
            file.fp.seek(file.start_dir)  # type: ignore[union-attr]
            file.writestr("archive/late", b"x")
        data = path.read_bytes()
    with pytest.raises(CheckpointError):
        forge.read(forge.written(path, data))


def test_a_local_header_that_disagrees_is_refused(path: Path) -> None:
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)})
    data = path.read_bytes().replace(b"archive/data/0", b"archive/data/9", 1)
    with pytest.raises(NotACheckpoint, match="contradicts"):
        forge.read(forge.written(path, data))


def test_a_directory_that_claims_many_entries_is_refused_before_it_is_read(path: Path) -> None:
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)})
    data = bytearray(path.read_bytes())
    struct.pack_into("<HH", data, len(data) - 14, 60_000, 60_000)
    with pytest.raises(LimitExceeded, match="60000 entries"):
        forge.read(forge.written(path, bytes(data)), archive_entries=1000)


def test_legacy_storages_must_fill_the_file(path: Path) -> None:
    main = state_pickle({"w": tensor(storage("0", 100, legacy=True), [100], [1])})
    elements = bytes(400)
    forge.read(forge.legacy(path, main, ["0"], struct.pack("<q", 100) + elements))
    for tail, kind in (
        (struct.pack("<q", 100) + elements[:-1], TruncatedFile),
        (struct.pack("<q", 100) + elements + b"x", NotACheckpoint),
        (struct.pack("<q", 99) + elements, NotACheckpoint),
        (struct.pack("<q", 10**12) + elements, NotACheckpoint),
        (struct.pack("<q", -1) + elements, NotACheckpoint),
    ):
        with pytest.raises(kind):
            forge.read(forge.legacy(path, main, ["0"], tail))
    for keys in ([], ["1"], ["0", "0"]):
        with pytest.raises(CheckpointError):
            forge.read(forge.legacy(path, main, keys, struct.pack("<q", 100) + elements))


def test_a_legacy_storage_claims_memory_only_after_the_sum_is_checked(path: Path) -> None:
    main = state_pickle({"w": tensor(storage("0", 10**11, legacy=True), [1], [1])})
    with pytest.raises(TruncatedFile, match="need 400000000008 bytes"):
        forge.read(forge.legacy(path, main, ["0"], struct.pack("<q", 10**11) + bytes(40)))


def test_big_endian_files_are_told(path: Path) -> None:
    archive(path, one_tensor([1], [1], 1), {"0": bytes(4)})
    whole = path.read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            data = b"big" if info.filename.endswith("byteorder") else source.read(info)
            target.writestr(info.filename, data)
    with pytest.raises(UnsupportedContainer, match="big-endian"):
        forge.read(forge.written(path, out.getvalue()))


def test_attributes_on_the_mapping_cannot_shadow_its_methods(path: Path) -> None:
    mapping = global_("collections", "OrderedDict") + b")R"
    entry = text("w") + tensor(storage("0", 1), [1], [1]) + b"s"
    attributes = b"}(" + b"".join(
        text(name) + text("x") for name in ("items", "keys", "values", "__iter__", "get")
    )
    archive(path, b"\x80\x02" + mapping + entry + attributes + b"ub.", {"0": bytes(4)})
    assert list(forge.read(path).state) == ["w"]
