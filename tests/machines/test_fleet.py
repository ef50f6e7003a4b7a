"""Two services over one PostgreSQL and one blob folder, each with a data folder of its own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text

from tests.machines import small
from tests.machines.machine import Booted, Machine
from tests.running import eventually

FOLLOW_SECONDS = 0.3
STALE_SECONDS = 3.0


@pytest.fixture
def shared(box: Machine, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings of services that share a database and blobs."""
    server = os.environ.get("TEST_POSTGRES_URL")
    if not server:
        pytest.skip("TEST_POSTGRES_URL names no PostgreSQL server to test on")
    name = f"foldserve_{uuid.uuid4().hex}"
    engine = create_engine(
        server, isolation_level="AUTOCOMMIT", connect_args={"client_encoding": "utf8"}
    )
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield {
        "FOLDSERVE_DATABASE_URL": make_url(server)
        .set(database=name)
        .render_as_string(hide_password=False),
        "FOLDSERVE_BLOB_URL": f"file://{tmp_path}/blobs",
        "FOLDSERVE_FOLLOW_SECONDS": str(FOLLOW_SECONDS),
        "FOLDSERVE_CONVERSION_STALE_SECONDS": str(STALE_SECONDS),
    }
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


def state(http: httpx.Client, model: str, version: int) -> str:
    found: str = http.get(f"/v1/models/{model}/versions/{version}").json()["state"]
    return found


def answers(http: httpx.Client, model: str, number: int) -> bool:
    response = small.predict(http, model)
    return response.status_code == 200 and small.answer(http, model) == number + 1.0


def test_services_on_one_database_act_as_one(box: Machine, shared: dict[str, str]) -> None:
    services = [box.boot(box.disk / f"fleet-{n}", shared) for n in range(2)]
    try:
        _act_as_one(box, services, shared)
    finally:
        box.faults.off()
        for service in services:
            service.kill()


def _act_as_one(box: Machine, services: list[Booted], shared: dict[str, str]) -> None:
    with services[0].client() as one, services[1].client() as other:
        for number in (1, 2):
            assert small.upload(one, "net", number, wait=True).status_code == 201
        eventually(lambda: answers(other, "net", 2), "a model uploaded here is served there")
        assert one.put("/v1/models/net/default", json={"version": 1}).status_code == 200
        took = eventually(lambda: answers(other, "net", 1), "a switch here is followed there")
        print(f"a switch was followed after {took:.2f} s")
        for number in range(3, 9):
            small.upload(one, "many", number)
        eventually(
            lambda: all(state(other, "many", n) == "ready" for n in range(1, 7)),
            "every conversion is done by one of the two",
        )
        workers = {
            other.get(f"/v1/models/many/versions/{n}/events").text.count('"converting"')
            for n in range(1, 7)
        }
        assert workers == {1}, "each was claimed once"
        assert one.delete("/v1/models/many").status_code == 204
        eventually(
            lambda: small.predict(other, "many").status_code == 404, "a deletion is followed"
        )
        # The one that converts dies, and the other takes its conversion up.
        services[1].kill()
        box.faults.kill(services[0].pid, 15)
        with pytest.raises(httpx.TransportError):
            _upload_until_dead(one)
        box.faults.off()
    services[1] = box.boot(box.disk / "fleet-2", shared)
    with services[1].client() as other:
        took = eventually(lambda: _all_final(other), "a dead service's conversion is taken up")
        print(f"a dead service's conversion was taken up and done after {took:.2f} s")


def _upload_until_dead(http: httpx.Client) -> None:
    small.upload(http, "orphan", 9, wait=True)
    while True:
        http.get("/health/live")


def _all_final(http: httpx.Client) -> bool:
    counts = http.get("/health").json()["versions"]
    return bool(counts["queued"] + counts["converting"] == 0)
