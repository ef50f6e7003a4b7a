from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.running import RunningServer, running

FOLDER = Path(__file__).parent
pytest_plugins = ["tests.promises"]

SLOWEST = (
    *("conformance/test_http.py", "conformance/test_table", "test_demo.py", "test_cli.py"),
    *("machines/test_crash.py", "machines/test_disk.py", "test_readme.py", "api/test_fuzz.py"),
    *("api/test_hostile_files.py", "checkpoint/test_fuzz.py", "fusion/test_property.py"),
    *("machines/test_drain.py", "load/", "web/", "test_provision.py", "api/test_tracing.py"),
)
"""Files, or how they begin, that take longest. They come first, so that no process of several
ends with one of them while the others have nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files first, all else as it was."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(FOLDER).as_posix()
        found = (place for place, slow in enumerate(SLOWEST) if path.startswith(slow))
        return next(found, len(SLOWEST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One running service for all tests of a session; each test uses model names of its own."""
    with running(tmp_path_factory.mktemp("server") / "data") as server:
        yield server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the session's service."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
