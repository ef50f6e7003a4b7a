"""A full or failing disk at every single change that a service makes, and its recovery."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

from service.store import BlobStore, Catalog, sqlite_url, verify
from tests.machines import small
from tests.machines.machine import Booted, Machine
from tests.running import eventually

Ask = Callable[[httpx.Client], httpx.Response]
BEYOND = 100_000
"""A change that no request comes to."""

CODES = {"storage_full": 507, "store_error": 500, "conflict": 409}


@pytest.fixture(scope="module")
def service(box: Machine) -> Iterator[Booted]:
    """A service whose model `net` has two ready versions."""
    box.faults.off()
    booted = box.boot(box.disk / "failing")
    with booted.client() as http:
        for number in (1, 2):
            assert small.upload(http, "net", number, wait=True).status_code == 201
    yield booted
    box.faults.off()
    booted.kill()


def changes_of(box: Machine, http: httpx.Client, ask: Ask) -> int:
    """How many changes the disk sees while a request is answered."""
    box.faults.count()
    response = ask(http)
    seen = box.faults.seen
    box.faults.off()
    assert response.status_code < 300, response.text
    return seen


def upload(http: httpx.Client, *, wait: bool = False) -> httpx.Response:
    upload.number += 1  # type: ignore[attr-defined]
    return small.upload(http, "net", upload.number, wait=wait)  # type: ignore[attr-defined]


upload.number = 100  # type: ignore[attr-defined]


def delete_last(http: httpx.Client) -> httpx.Response:
    versions = http.get("/v1/models/net/versions").json()["items"]
    return http.delete(f"/v1/models/net/versions/{versions[0]['version']}")


def keep_some_to_delete(http: httpx.Client) -> None:
    """Conversions make changes too, so how many deletions are tried is not known before."""
    if len(http.get("/v1/models/net/versions").json()["items"]) < 6:
        for _ in range(8):
            assert upload(http).status_code == 202


def switch(http: httpx.Client) -> httpx.Response:
    now = http.get("/v1/models/net").json()["default_version"]
    return http.put("/v1/models/net/default", json={"version": 1 if now == 2 else 2})


def play(box: Machine, http: httpx.Client, ask: Ask, error: int, *, lasting: bool) -> Counter[str]:
    """Ask again and again, with the fault one change later each time; what was answered."""
    told: Counter[str] = Counter()
    for at in (*range(1, changes_of(box, http, ask) + 3), BEYOND):
        if ask is delete_last:
            keep_some_to_delete(http)
        box.faults.fail(at, error, lasting=lasting)
        response = ask(http)
        struck = box.faults.struck
        box.faults.off()
        if response.status_code < 300:
            told["done" if not struck else "done in spite of it"] += 1
            continue
        assert struck, response.text
        problem = response.json()
        assert response.headers["content-type"] == "application/problem+json"
        assert CODES.get(problem["code"]) == response.status_code, problem
        told[problem["code"]] += 1
    return told


def whole(box: Machine, service: Booted, http: httpx.Client) -> None:
    """Nothing is damaged, nothing lies about, and everything works again."""
    for version in (1, 2):
        assert small.answer(http, "net", version) == pytest.approx(version + 1)
    assert upload(http, wait=True).status_code == 201
    assert switch(http).status_code == 200
    catalog = Catalog(sqlite_url(service.data_dir / "catalog.sqlite3"))
    blobs = BlobStore(service.data_dir / "blobs")
    blobs.sweep_temporary()  # the disk may have refused to remove a file
    try:
        report = verify(catalog, blobs)
    finally:
        catalog.close()
    assert report.ok, report
    assert not report.spoilt
    assert report.temporary_files == 0
    assert httpx.get(f"{service.url}/health/ready").status_code == 200


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
@pytest.mark.parametrize("ask", [upload, switch, delete_last])
def test_a_request_is_refused_clearly_or_done(
    box: Machine, service: Booted, ask: Ask, error: int, lasting: bool
) -> None:
    with service.client() as http:
        if ask is delete_last:
            keep_some_to_delete(http)
        told = play(box, http, ask, error, lasting=lasting)
        print(ask.__name__, errno.errorcode[error], lasting, dict(told))
        assert told["done"] >= 1, "beyond the last change nothing fails"
        wanted = "storage_full" if error == errno.ENOSPC else "store_error"
        assert told[wanted] > 0
        whole(box, service, http)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_a_conversion_is_rejected_clearly_or_done(
    box: Machine, service: Booted, error: int
) -> None:
    """The fault strikes the service or the child that converts, wherever the change is made."""
    with service.client() as http:
        at, told = 1, Counter[str]()
        total = changes_of(box, http, lambda http: upload(http, wait=True))
        while at <= total:
            box.faults.fail(at, error)
            response = upload(http, wait=True)
            box.faults.off()
            code = "done" if response.status_code == 201 else response.json()["code"]
            assert code in ("done", "storage_full", "store_error", "conversion_crashed"), code
            told[code] += 1
            at += 7
        print("conversion", errno.errorcode[error], dict(told))
        wanted = "storage_full" if error == errno.ENOSPC else "store_error"
        assert told[wanted] > told.total() / 2
        whole(box, service, http)


@pytest.mark.parametrize("share", [0.35, 0.6, 0.85])
def test_a_conversion_on_a_disk_that_stays_full_is_settled_when_space_returns(
    box: Machine, service: Booted, share: float
) -> None:
    with service.client() as http:
        total = changes_of(box, http, lambda http: upload(http, wait=True))
        box.faults.fail(int(total * share), lasting=True)
        url = upload(http).headers["location"]
        eventually(lambda: box.faults.struck > 0, "the disk is full")
        time.sleep(0.3)  # whatever is tried meanwhile fails
        box.faults.off()
        eventually(lambda: http.get(url).json()["state"] in ("ready", "rejected"), "it is settled")
        found = http.get(url).json()
        # It could not even be said that it failed, so it was taken up again.
        if found["state"] == "rejected":
            assert found["error"]["code"] == "storage_full", found
        whole(box, service, http)
