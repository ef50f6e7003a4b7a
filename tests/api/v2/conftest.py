from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from tritonclient import http as triton

from tests.running import RunningServer


def address(server: RunningServer) -> str:
    """Where the service answers, as tritonclient wants to be told."""
    return urlsplit(server.url).netloc


@pytest.fixture
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    """The protocol's reference client, several connections wide."""
    with triton.InferenceServerClient(address(server), concurrency=8) as client:
        yield client
