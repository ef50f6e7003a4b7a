"""A service with a short queue that serves a slow network and one that can fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.load import subjects
from tests.running import RunningServer, running

SETTINGS = {
    "FOLDSERVE_QUEUE_ROWS": "32",
    "FOLDSERVE_MAX_BATCH": "4",
    "FOLDSERVE_TORCH_THREADS": "1",
}


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("loaded")
    with running(folder / "data", SETTINGS, fresh=True) as server:
        subjects.upload(server, "busy", subjects.busy_checkpoint(), subjects.BUSY_CONFIG)
        lookup = subjects.lookup_bundle(folder)
        subjects.upload(server, "lookup", lookup, {"backend": "torch"})
        yield server
