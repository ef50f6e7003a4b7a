"""`foldserve verify`, `gc` and `backup` as processes: what they print and how they end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from service.store import BlobStore, Catalog, sqlite_url
from tests.running import foldserve


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A data folder with one version, and one blob that nobody needs, put two hours ago."""
    folder = tmp_path / "data"
    blobs = BlobStore(folder / "blobs")
    catalog = Catalog(sqlite_url(folder / "catalog.sqlite3"))
    for data in (b"needed", b"idle"):
        with blobs.writer() as writer:
            writer.write(data)
            ref = writer.commit()
        if data == b"needed":
            catalog.create_version("net", ref.sha256, ref.size, None, {}, present=blobs.exists)
        os.utime(blobs.open_path(ref.sha256), (time.time() - 7200,) * 2)
    catalog.close()
    return folder


def run(*arguments: str) -> tuple[int, Any]:
    """Exit status and what the JSON on standard output says, None where there is none."""
    done = foldserve(*arguments, "--json")
    return done.returncode, json.loads(done.stdout) if done.stdout else None


def test_verify_gc_and_backup_say_how_it_went(store: Path, tmp_path: Path) -> None:
    at, copy = ("--data-dir", str(store)), tmp_path / "copy"
    status, done = run("gc", *at)
    assert (status, done["collected"]) == (0, 1)

    status, done = run("backup", str(copy), *at)
    assert (status, done["blobs"], done["copied"]) == (0, 1, 1)
    status, report = run("verify", "--data-dir", str(copy))
    assert (status, report["ok"], report["blobs"]) == (0, True, 1)

    # The control: a byte that changed is found, by its name and by who needs it.
    (blob,) = (copy / "blobs" / "objects").glob("*/*")
    blob.write_bytes(b"neede_")
    status, report = run("verify", "--data-dir", str(copy))
    assert (status, report["ok"]) == (1, False)
    (damage,) = report["damaged"]
    assert (damage["sha256"], damage["needed_by"]) == (blob.name, ["net/1 checkpoint"])
    assert run("backup", str(tmp_path / "other"), "--data-dir", str(copy))[0] == 1
