from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.running import RunningServer, running

pytest_plugins = ["tests.promises"]


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
