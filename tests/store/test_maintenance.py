"""`verify`, `collect` and `back_up`: a whole store, beside a service that goes on writing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sqlite3
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from service.errors import BlobCorrupt, Conflict, StoreError
from service.settings import Settings
from service.store import BlobStore, Catalog, back_up, collect, sqlite_url, verify
from service.store.backup import BLOBS_NAME, CATALOG_NAME
from service.store.leases import Lease, dead_workers, remove

from .helpers import in_threads

HOUR = timedelta(hours=1)
FLIPS = 1000


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def put(blobs: BlobStore, data: bytes) -> str:
    with blobs.writer() as writer:
        writer.write(data)
        return writer.commit().sha256


def add(catalog: Catalog, blobs: BlobStore, data: bytes, model: str = "net") -> str:
    """An upload as the service does it: the blob, then its row."""
    sha256 = put(blobs, data)
    catalog.create_version(model, sha256, len(data), None, {}, present=blobs.exists)
    return sha256


def age(blobs: BlobStore, sha256: str, seconds: float = 7200) -> None:
    path = blobs.open_path(sha256, verify=False)
    os.utime(path, (time.time() - seconds,) * 2)


def test_every_flipped_byte_is_refused_and_reported(blobs: BlobStore) -> None:
    """1,000 single bytes changed in turn: all refused by whoever opens or verifies the blob."""
    chance = random.Random(3)
    data = chance.randbytes(3000)
    sha256 = put(blobs, data)
    path = blobs.open_path(sha256)
    refused = reported = 0
    for position in chance.sample(range(len(data)), FLIPS):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(bytes([data[position] ^ chance.randrange(1, 256)]))
        try:
            blobs.open_path(sha256)
        except BlobCorrupt:
            refused += 1
            reported += sha256 in blobs.damaged
        with path.open("r+b") as file:
            file.seek(position)
            file.write(data[position : position + 1])
        blobs.open_path(sha256)
        assert blobs.damaged == {}, "a blob that is whole again is not reported"
    assert (refused, reported) == (FLIPS, FLIPS)


def test_without_verification_no_flip_is_noticed(blobs: BlobStore) -> None:
    sha256 = put(blobs, b"weights")
    blobs.open_path(sha256).write_bytes(b"weightz")
    assert blobs.open_path(sha256, verify=False).read_bytes() == b"weightz"
    assert blobs.damaged == {}


def test_a_whole_store_is_found_whole(catalog: Catalog, blobs: BlobStore) -> None:
    add(catalog, blobs, b"one")
    put(blobs, b"nobody needs this")
    with blobs.writer() as writer:
        writer.write(b"under way")
        report = verify(catalog, blobs)
    assert report.ok
    assert (report.blobs, report.references, report.temporary_files) == (2, 1, 1)
    assert report.unreferenced == (hashlib.sha256(b"nobody needs this").hexdigest(),)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_changed_and_a_missing_blob_are_found_with_those_who_need_them(
    catalog: Catalog, blobs: BlobStore
) -> None:
    changed, missing = add(catalog, blobs, b"one"), add(catalog, blobs, b"two", "other")
    spare = put(blobs, b"spare")
    for sha256 in (changed, spare):
        blobs.open_path(sha256).write_bytes(b"zzz")
    blobs.delete(missing)
    report = verify(catalog, blobs)
    assert not report.ok
    found = {damage.sha256: damage.needed_by for damage in report.damaged}
    assert found == {changed: ("net/1 checkpoint",), missing: ("other/1 checkpoint",)}
    assert report.spoilt == (spare,)


def test_only_old_blobs_that_nobody_needs_are_collected(catalog: Catalog, blobs: BlobStore) -> None:
    needed, old, young = add(catalog, blobs, b"a"), put(blobs, b"b"), put(blobs, b"c")
    age(blobs, needed)
    age(blobs, old)
    assert collect(catalog, blobs, older_than=HOUR, dry_run=True).collected == 1
    assert blobs.exists(old), "a dry run deletes nothing"
    done = collect(catalog, blobs, older_than=HOUR)
    assert (done.collected, done.bytes, done.young) == (1, 1, 1)
    assert [blobs.exists(each) for each in (needed, old, young)] == [True, False, True]
    catalog.delete_model("net")
    assert collect(catalog, blobs, older_than=HOUR).collected == 1


def test_a_version_whose_blob_was_collected_is_never_made(
    catalog: Catalog, blobs: BlobStore
) -> None:
    sha256 = put(blobs, b"weights")
    blobs.delete(sha256)
    with pytest.raises(Conflict, match="collected"):
        catalog.create_version("net", sha256, 7, None, {}, present=blobs.exists)
    with pytest.raises(StoreError):
        catalog.get_version("net", 1)


def test_the_look_for_a_blob_holds_the_lock_that_collectors_take(
    tmp_path: Path, blobs: BlobStore
) -> None:
    """Looked for before the transaction began, a blob could be collected before its row was in."""
    file = tmp_path / "catalog.sqlite"
    catalog = Catalog(sqlite_url(file))
    locked = list[bool]()

    def present(sha256: str) -> bool:
        with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
                locked.append(False)
            except sqlite3.OperationalError:
                locked.append(True)
        return blobs.exists(sha256)

    sha256 = put(blobs, b"weights")
    present(sha256)
    catalog.create_version("net", sha256, 7, None, {}, present=present)
    catalog.close()
    assert locked == [False, True], "the first is the control: nobody writes"


def race(catalog: Catalog, blobs: BlobStore, *, rounds: int, careful: bool = True) -> int:
    """Upload and forget the same old bytes over and over beside a collector; rows without blobs."""
    done = threading.Event()
    lost = [0]

    def work(index: int) -> None:
        if index == 0:
            while not done.is_set():
                if careful:
                    collect(catalog, blobs, older_than=HOUR)
                    continue
                known = catalog.references()  # what a collector without locks would do
                for blob in list(blobs.blobs()):
                    if blob.sha256 not in known:
                        blobs.delete(blob.sha256)
            return
        try:
            for number in range(rounds):
                if lost[0]:
                    break
                model = f"net{index}"
                sha256 = put(blobs, b"the same bytes")
                try:
                    catalog.create_version(
                        model, sha256, 14, None, {}, present=blobs.exists if careful else None
                    )
                except Conflict:  # aged by the other thread and collected: refused, so not lost
                    continue
                lost[0] += not blobs.exists(sha256)
                catalog.delete_model(model)
                if number % 2:
                    age_if_there(blobs, sha256)
        finally:
            if index == 1:
                done.set()

    in_threads(3, work)
    return lost[0]


def age_if_there(blobs: BlobStore, sha256: str) -> None:
    try:
        age(blobs, sha256)
    except (BlobCorrupt, FileNotFoundError):
        return


def test_collecting_beside_uploads_of_the_same_bytes_loses_none(
    catalog: Catalog, blobs: BlobStore
) -> None:
    assert race(catalog, blobs, rounds=12) == 0


def test_a_collector_without_care_does_lose_some(tmp_path: Path, blobs: BlobStore) -> None:
    """The control: the same race, without the age, the lock and the look inside."""
    catalog = Catalog(sqlite_url(tmp_path / "catalog.sqlite"))
    try:
        assert race(catalog, blobs, rounds=400, careful=False) > 0
    finally:
        catalog.close()


def test_a_backup_made_while_uploads_go_on_is_whole(tmp_path: Path, blobs: BlobStore) -> None:
    catalog = Catalog(sqlite_url(tmp_path / "catalog.sqlite"))
    target = tmp_path / "backup"
    first = [add(catalog, blobs, b"first %d" % n) for n in range(5)]
    stop = threading.Event()

    def go_on() -> None:
        number = 0
        while not stop.is_set():
            add(catalog, blobs, b"later %d" % (number := number + 1))

    writer = threading.Thread(target=go_on)
    writer.start()
    try:
        done = [back_up(catalog, blobs, target) for _ in range(2)]
    finally:
        stop.set()
        writer.join()
        catalog.close()
    assert done[0].copied == done[0].blobs >= 5
    assert done[1].copied < done[1].blobs, "what is there is not copied again"
    settings = Settings(data_dir=target)
    assert settings.effective_database_url == sqlite_url(target / CATALOG_NAME)
    assert settings.effective_blob_url == str(target / BLOBS_NAME)
    restored = Catalog(settings.effective_database_url)
    try:
        report = verify(restored, BlobStore(settings.effective_blob_url))
        assert report.ok, report
        assert set(first) <= restored.references().keys()
        assert restored.integrity_problems() == ()
    finally:
        restored.close()


def test_a_backup_heals_its_own_blobs_and_refuses_damaged_ones(
    tmp_path: Path, blobs: BlobStore
) -> None:
    catalog = Catalog(sqlite_url(tmp_path / "catalog.sqlite"))
    try:
        sha256 = add(catalog, blobs, b"weights")
        back_up(catalog, blobs, tmp_path / "backup")
        copy = BlobStore(tmp_path / "backup" / BLOBS_NAME)
        copy.open_path(sha256).write_bytes(b"weightz")
        assert back_up(catalog, blobs, tmp_path / "backup").copied == 1
        copy.verify(sha256)
        copy.open_path(sha256).write_bytes(b"weightz")
        blobs.open_path(sha256).write_bytes(b"weighty")
        with pytest.raises(BlobCorrupt, match="hash to"):
            back_up(catalog, blobs, tmp_path / "backup")
    finally:
        catalog.close()


def test_the_dead_are_told_from_the_living_by_their_locks(tmp_path: Path) -> None:
    root = tmp_path / "conversions"
    assert dead_workers(root) == ()
    living = Lease(root, "living")
    (root / "dead").mkdir()
    (root / "dead" / "lock").touch()
    (root / "dead-before-it-locked").mkdir()
    assert dead_workers(root) == ("dead", "dead-before-it-locked")
    remove(root, dead_workers(root))
    assert [path.name for path in root.iterdir()] == ["living"]
    living.close()
    assert list(root.iterdir()) == []
