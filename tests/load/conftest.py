"""A service with a short queue that serves a slow network and one that can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
    with running(folder / "data", SETTINGS) as server:
        subjects.upload(server, "busy", subjects.busy_checkpoint(), subjects.BUSY_CONFIG)
        lookup = subjects.lookup_bundle(folder)
        subjects.upload(server, "lookup", lookup, {"backend": "torch"})
        yield server


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str, str, str, str], None]:
    """Writes a row of the table of promises beside pytest's own lines."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def row(what: str, promised: str, measured: str, control: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"\n| {what} | {promised} | {measured} | {control} |")

    return row
