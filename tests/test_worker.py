"""A conversion that fails is rejected, or queued again when it was the service that ended."""

from __future__ import annotations

from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from service import worker as module
from service.errors import DeviceLost
from service.hosting import worker_limits
from service.settings import Settings
from service.store import BlobStore, Catalog, sqlite_url
from service.worker import Worker


class NoHooks:
    """Nothing is prepared or published here."""

    def prepare(self, *_: Any) -> None: ...
    def published(self, *_: Any) -> None: ...
    def abandoned(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("stops", "state", "code"),
    [(True, "queued", None), (False, "rejected", "conversion_crashed")],
)
def test_what_the_end_of_the_service_breaks_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool, state: str, code: str | None
) -> None:
    """The loop ends while a version is being loaded: its worker sees a CancelledError."""
    catalog = Catalog(sqlite_url(tmp_path / "catalog.sqlite"))
    blobs = BlobStore(tmp_path / "blobs")
    worker = Worker(catalog, blobs, tmp_path / "scratch", worker_limits(Settings()), NoHooks())

    def end(*_: Any, **__: Any) -> None:
        if stops:
            worker.give_up()
        raise CancelledError

    monkeypatch.setattr(module, "run_sandboxed", end)
    with blobs.writer() as writer:
        writer.write(b"weights")
        ref = writer.commit()
    catalog.create_version("net", ref.sha256, ref.size, "net.pth", {})
    assert worker.run_once()
    version = catalog.get_version("net", 1)
    assert version.state.value == state
    assert (version.error or {}).get("code") == code
    catalog.close()


def test_what_a_lost_device_interrupts_is_taken_up_as_often_as_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes back into the queue, for the next start; but it may be what the device died of."""

    class Lost(NoHooks):
        def prepare(self, *_: Any) -> None:
            raise DeviceLost("cuda:0: CUDA error", device="cuda:0")

    catalog = Catalog(sqlite_url(tmp_path / "catalog.sqlite"))
    blobs = BlobStore(tmp_path / "blobs")
    converted = {"form": "train", "architecture": {}, "fusion": {}, "files": {}}
    monkeypatch.setattr(module, "run_sandboxed", lambda *_, **__: converted)
    with blobs.writer() as writer:
        writer.write(b"weights")
        ref = writer.commit()
    catalog.create_version("net", ref.sha256, ref.size, "net.pth", {})
    limits = worker_limits(Settings(conversion_attempts=2))
    found = []
    for _ in range(2):
        worker = Worker(catalog, blobs, tmp_path / "scratch", limits, Lost())
        assert worker.run_once()
        assert worker.conversions()["interrupted"].count == 1
        version = catalog.get_version("net", 1)
        found.append((version.state.value, (version.error or {}).get("code")))
    assert found == [("queued", None), ("rejected", "conversion_interrupted")]
    catalog.close()
