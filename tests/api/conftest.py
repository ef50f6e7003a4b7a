from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.store import Catalog, Scope, sqlite_url
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


GUARDED = {
    "FOLDSERVE_AUTH": "keys",
    "FOLDSERVE_KEY_REFRESH_SECONDS": "0.4",
    "FOLDSERVE_ALLOWED_HOSTS": "models.example.com",
    "FOLDSERVE_CORS_ORIGINS": "https://app.example.com",
    "FOLDSERVE_RATE_LIMIT": "5",
    "FOLDSERVE_RATE_LIMIT_BURST": "150",
    "FOLDSERVE_MAX_CONNECTIONS": "40",
    "FOLDSERVE_MAX_HEAD_BYTES": "4096",
    "FOLDSERVE_MAX_HEADERS": "30",
    "FOLDSERVE_MAX_URL_BYTES": "1500",
    "FOLDSERVE_HEAD_SECONDS": "1",
    "FOLDSERVE_BODY_IDLE_SECONDS": "1",
    "FOLDSERVE_UPLOAD_IDLE_SECONDS": "1",
    "FOLDSERVE_MIN_BYTES_PER_SECOND": "10000",
    "FOLDSERVE_RESPONSE_IDLE_SECONDS": "1",
    "FOLDSERVE_MAX_PARTS": "4",
    "FOLDSERVE_MAX_PART_HEADER_BYTES": "300",
    "FOLDSERVE_MAX_BODY_BYTES": "20000000",
    "FOLDSERVE_LOG_LEVEL": "debug",
    "FOLDSERVE_ACCESS_LOG": "true",
}
KEYS = {
    "admin": tuple(Scope),
    "reader": (Scope.READ,),
    "predictor": (Scope.PREDICT,),
    "writer": (Scope.WRITE,),
    "eager": (Scope.READ,),
    "caller": (Scope.PREDICT,),
}


def catalog_of(data_dir: Path) -> Catalog:
    """The catalog of a service beside which a test works."""
    return Catalog(sqlite_url(data_dir / "catalog.sqlite3"))


@pytest.fixture(scope="session")
def guarded(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunningServer, dict[str, str]]]:
    """A service that asks for keys, whose limits on connections are small, and its keys by name."""
    folder = tmp_path_factory.mktemp("guarded") / "data"
    folder.mkdir()
    catalog = catalog_of(folder)
    keys = {name: catalog.keys.create(name, scopes)[0] for name, scopes in KEYS.items()}
    catalog.close()
    with running(folder, GUARDED | {"FOLDSERVE_GRPC_PORT": str(free_port())}) as server:
        yield server, keys


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def keyed(guarded: tuple[RunningServer, dict[str, str]]) -> Iterator[dict[str, httpx.Client]]:
    """A client for every key, and `nobody` without one."""
    server, keys = guarded
    bearer = {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    clients = {
        name: httpx.Client(base_url=server.url, timeout=60, headers=headers)
        for name, headers in (bearer | {"nobody": {}}).items()
    }
    yield clients
    for client in clients.values():
        client.close()
