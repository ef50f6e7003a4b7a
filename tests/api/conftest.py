from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.api import tiny
from tests.running import RunningServer, running

SMALL = {
    "FOLDSERVE_MAX_UPLOAD_BYTES": "300000",
    "FOLDSERVE_MAX_CONFIG_BYTES": "200",
    "FOLDSERVE_MAX_BODY_BYTES": "40000",
    "FOLDSERVE_MAX_JSON_BYTES": "20000",
    "FOLDSERVE_MAX_IMAGE_PIXELS": "10000",
    "FOLDSERVE_MAX_IMAGES": "3",
    "FOLDSERVE_MAX_PAGE_SIZE": "3",
    "FOLDSERVE_PAGE_SIZE": "2",
    "FOLDSERVE_MAX_BATCH": "4",
    "FOLDSERVE_QUEUE_ROWS": "4",
    "FOLDSERVE_UPLOAD_IDLE_SECONDS": "0.5",
    "FOLDSERVE_BODY_IDLE_SECONDS": "0.5",
    "FOLDSERVE_BENCHMARK_SECONDS": "2",
    "FOLDSERVE_BENCHMARK_BATCH_SIZES": "1,2",
}


def put_tiny(
    http: httpx.Client, model: str, seed: int = 0, *, ready: bool = True
) -> httpx.Response:
    """Upload the tiny network and, if asked, wait until it serves."""
    answer = http.post(
        f"/v1/models/{model}/versions",
        files={"checkpoint": ("tiny.pth", tiny.checkpoint(seed))},
        data={"config": json.dumps(tiny.CONFIG)},
        headers={"Prefer": "wait=100"} if ready else {},
    )
    assert answer.status_code == (201 if ready else 202), answer.text
    return answer


@pytest.fixture(scope="session")
def model(server: RunningServer) -> str:
    """The name of a model that serves the tiny network as its version 1. Not to be changed."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        put_tiny(client, "tiny")
    return "tiny"


@pytest.fixture(scope="session")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A service whose every limit is small; it serves the tiny network as `tiny`."""
    with running(tmp_path_factory.mktemp("small") / "data", SMALL) as server:
        with httpx.Client(base_url=server.url, timeout=120) as client:
            answer = client.post(
                "/v1/models/tiny/versions",
                files={"checkpoint": ("tiny.pth", tiny.checkpoint())},
                data={"config": json.dumps(tiny.CONFIG)},
                headers={"Prefer": "wait=100"},
            )
            assert answer.status_code == 201, answer.text
        yield server


@pytest.fixture
def small(small_server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the service with small limits."""
    with httpx.Client(base_url=small_server.url, timeout=60) as client:
        yield client
