"""Blobs: what is published is whole, and nothing else is ever visible."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import BlobCorrupt, StorageFull, StoreError, UploadTooLarge
from service.store import BlobRef, BlobStore, BlobWriter, blobs

from .helpers import in_threads


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """A store in a folder, and one at a URL that is not local."""
    if request.param == "local":
        return BlobStore(tmp_path / "blobs")
    return BlobStore("memory:///", local_dir=tmp_path / "blobs")


@pytest.fixture
def local(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def put(store: BlobStore, data: bytes) -> BlobRef:
    with store.writer() as writer:
        writer.write(data)
        return writer.commit()


def write_and_commit(writer: BlobWriter, data: bytes) -> None:
    writer.write(data)
    writer.commit()


def files_under(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=300), max_size=12))
def test_any_pieces_come_back_as_one(store: BlobStore, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    with store.writer() as writer:
        for piece in pieces:
            writer.write(piece)
        ref = writer.commit()
    assert ref == BlobRef(hashlib.sha256(data).hexdigest(), len(data))
    assert b"".join(store.read_chunks(ref.sha256)) == data
    assert store.open_path(ref.sha256).read_bytes() == data
    assert store.size(ref.sha256) == len(data)
    store.verify(ref.sha256)


def test_a_file_is_put_and_listed(store: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    ref = store.put_file(source)
    (info,) = store.blobs()
    assert (info.sha256, info.size) == (ref.sha256, 3_000_000)
    assert abs(info.modified.timestamp() - time.time()) < 60
    assert sum(map(len, store.read_chunks(ref.sha256, chunk_bytes=1_000_000))) == 3_000_000
    assert source.exists()


def test_the_same_bytes_are_one_blob(store: BlobStore) -> None:
    assert put(store, b"weights") == put(store, b"weights")
    assert len(list(store.blobs())) == 1


def test_many_threads_may_put_the_same_bytes(store: BlobStore) -> None:
    in_threads(6, lambda i: [put(store, b"%d" % (n % 3)) for n in range(6)])
    assert len(list(store.blobs())) == 3
    assert store.sweep_temporary() == 0


def test_delete_is_idempotent(store: BlobStore) -> None:
    ref = put(store, b"weights")
    store.open_path(ref.sha256)
    assert store.exists(ref.sha256)
    assert store.delete(ref.sha256)
    assert not store.delete(ref.sha256)
    assert not store.exists(ref.sha256)
    for read in (store.read_chunks, store.open_path, store.verify, store.size):
        with pytest.raises(BlobCorrupt, match="does not hold"):
            read(ref.sha256)


@pytest.mark.parametrize("name", ["", "ab", "../../etc/passwd", "A" * 64, "a" * 63 + "/"])
def test_only_hashes_name_blobs(local: BlobStore, name: str) -> None:
    for call in (local.exists, local.open_path, local.delete, local.verify):
        with pytest.raises(ValueError, match="not a sha256"):
            call(name)


def test_leaving_without_commit_leaves_nothing(local: BlobStore, tmp_path: Path) -> None:
    with local.writer() as writer:
        writer.write(b"half")
    with suppress(ConnectionError), local.writer() as writer:
        writer.write(b"half")
        raise ConnectionError("the client went away")
    assert files_under(tmp_path / "blobs") == []
    with pytest.raises(StoreError, match="closed"):
        writer.commit()
    with pytest.raises(StoreError, match="closed"):
        writer.write(b"more")


def test_a_wrong_announcement_publishes_nothing(local: BlobStore, tmp_path: Path) -> None:
    right = hashlib.sha256(b"weights").hexdigest()
    for kwargs in ({"expected_sha256": "0" * 64}, {"expected_size": 8}, {"expected_size": 0}):
        with local.writer() as writer:
            writer.write(b"weights")
            with pytest.raises(BlobCorrupt):
                writer.commit(**kwargs)
    assert files_under(tmp_path / "blobs") == []
    with local.writer() as writer:
        writer.write(b"weights")
        assert writer.commit(expected_sha256=right, expected_size=7).sha256 == right


def test_the_size_limit_is_exact(local: BlobStore, tmp_path: Path) -> None:
    with local.writer(max_bytes=10) as writer:
        writer.write(b"12345")
        writer.write(b"67890")
        assert writer.commit().size == 10
    local.delete(hashlib.sha256(b"1234567890").hexdigest())
    with local.writer(max_bytes=10) as writer:
        writer.write(b"1234567890")
        with pytest.raises(UploadTooLarge) as refused:
            writer.write(b"x")
    assert refused.value.extra["limit"] == 10
    assert files_under(tmp_path / "blobs") == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_full_disk_is_said_so_and_leaves_nothing(
    local: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with local.writer() as writer:
        if call == "write":
            writer._file = _Full(writer._file, code)  # type: ignore[assignment]
        else:
            monkeypatch.setattr(os, call, full)
        with pytest.raises(StorageFull):
            write_and_commit(writer, b"weights")
    monkeypatch.undo()
    assert files_under(tmp_path / "blobs") == []
    assert put(local, b"weights").size == 7


class _Full:
    """A file on a disk without space."""

    def __init__(self, file: object, code: int) -> None:
        self._file, self._code = file, code

    def write(self, _data: bytes) -> None:
        raise OSError(self._code, "no space")

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)


def test_a_really_full_device_is_storage_full(local: BlobStore) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with local.writer() as writer, full.open("wb") as device:
        os.dup2(device.fileno(), writer._file.fileno())
        with pytest.raises(StorageFull):
            write_and_commit(writer, b"x" * (blobs.CHUNK_BYTES + 1))


def test_other_disk_errors_are_store_errors(
    local: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="Input/output error") as raised:
        put(local, b"weights")
    assert not isinstance(raised.value, StorageFull)
    monkeypatch.undo()
    assert files_under(tmp_path / "blobs") == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=200), draw=st.data())
def test_any_flipped_bit_is_found_and_healed_by_the_next_put(
    local: BlobStore, data: bytes, draw: st.DataObject
) -> None:
    ref = put(local, data)
    path = local.open_path(ref.sha256)
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    for read in (local.verify, local.open_path):
        with pytest.raises(BlobCorrupt, match="hash to"):
            read(ref.sha256)
    put(local, data)
    local.verify(ref.sha256)


def test_a_blob_that_is_put_again_stays_the_same_file(local: BlobStore) -> None:
    """A conversion may have been granted that file, by its inode, and not yet have opened it."""
    path = local.open_path(put(local, b"weights").sha256)
    os.utime(path, (1, 1))
    granted = path.stat().st_ino
    put(local, b"weights")
    assert path.stat().st_ino == granted
    assert path.stat().st_mtime > 1, "a collector must see that it was put again"
    path.write_bytes(b"weightz")
    put(local, b"weights")
    assert path.stat().st_ino != granted, "the control: a damaged one is replaced"
    assert path.read_bytes() == b"weights"


def test_a_cached_remote_blob_is_checked_too(tmp_path: Path) -> None:
    store = BlobStore("memory:///", local_dir=tmp_path)
    ref = put(store, b"weights")
    store.open_path(ref.sha256).write_bytes(b"weightz")
    with pytest.raises(BlobCorrupt):
        store.open_path(ref.sha256)
    assert store.open_path(ref.sha256).read_bytes() == b"weights", "the copy is fetched again"


def test_who_fetches_a_remote_blob_second_leaves_the_first_ones_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion may have been granted that file, by its inode, and not yet have opened it."""
    store = BlobStore("memory:///", local_dir=tmp_path)
    ref = put(store, b"weights")
    read, granted = store.read_chunks, []

    def overtaken(sha256: str) -> Iterator[bytes]:
        """While one fetches, another one does, wholly."""
        monkeypatch.setattr(store, "read_chunks", read)
        granted.append(store.open_path(sha256).stat().st_ino)
        return read(sha256)

    monkeypatch.setattr(store, "read_chunks", overtaken)
    assert store.open_path(ref.sha256).stat().st_ino == granted[0]
    assert store.temporary_files() == 0


def test_a_store_that_is_not_local_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="local_dir"):
        BlobStore("memory:///")


_DYING_WRITER = """
import sys, time
from pathlib import Path
from service.store import BlobStore
writer = BlobStore(Path(sys.argv[1])).writer()
writer.write(b"x" * 5_000_000)
print("writing", flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_only_what_the_sweep_removes(
    local: BlobStore, tmp_path: Path
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _DYING_WRITER, str(tmp_path / "blobs")], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        assert local.sweep_temporary() == 0, "a living writer's file was taken away"
        (left,) = files_under(tmp_path / "blobs")
        assert left.startswith("temporary/")
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert list(local.blobs()) == []
    assert local.sweep_temporary() == 1
    assert files_under(tmp_path / "blobs") == []


_BIG_UPLOAD = """
import resource, sys
from pathlib import Path
from service.store import BlobStore
store = BlobStore(Path(sys.argv[1]))
with store.writer() as writer:  # warms up imports and buffers
    writer.write(b"x" * (1 << 20))
    writer.commit()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
piece = bytes(1 << 16)
with store.writer() as writer:
    for _ in range(int(sys.argv[2]) >> 16):
        writer.write(piece)
    ref = writer.commit()
for chunk in store.read_chunks(ref.sha256):
    pass
store.open_path(ref.sha256)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_upload_needs_little_memory(tmp_path: Path) -> None:
    grown = subprocess.run(
        [sys.executable, "-c", _BIG_UPLOAD, str(tmp_path), str(200 << 20)],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(grown.stdout) < 24 * 1024, "kB of resident memory for 200 MB"


def test_publishing_syncs_the_file_before_its_name_and_the_folder_after(
    local: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = list[str]()

    def spy(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
            order.append("fsync folder" if is_folder else name)
            return real(*args)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, spy(name, getattr(os, name)))
    put(local, b"weights")
    # The second is that of `objects`, in which the blob's own folder is new.
    assert order == ["fsync", "fsync folder", "replace", "fsync folder"]
