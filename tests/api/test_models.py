from __future__ import annotations

import time
import uuid

import httpx
import numpy as np
import pytest

from tests.api import tiny
from tests.api.conftest import put_tiny
from tests.api.problem import problem

OCTETS = {"Content-Type": "application/octet-stream"}
NPY = {"Content-Type": tiny.NPY, "Accept": tiny.NPY}


def answered_by(http: httpx.Client, model: str, **query: int) -> tuple[int, int]:
    """The version that the answer names, and the seed of the weights that computed it."""
    rows = tiny.rows(2)
    answer = http.post(
        f"/v1/models/{model}/predict", params=query, content=tiny.npy(rows), headers=NPY
    )
    assert answer.status_code == 200, answer.text
    found = tiny.from_npy(answer.content)
    errors = [np.abs(found - tiny.expected(rows, seed)).max() for seed in (0, 1)]
    return int(answer.headers["foldserve-version"]), int(np.argmin(errors))


def test_versions_roll_forward_back_and_away(http: httpx.Client) -> None:
    url = "/v1/models/rolling"
    put_tiny(http, "rolling", seed=0)
    assert answered_by(http, "rolling") == (1, 0)
    put_tiny(http, "rolling", seed=1)
    assert answered_by(http, "rolling") == (2, 1)
    assert answered_by(http, "rolling", version=1) == (1, 0)

    body = http.put(f"{url}/default", json={"version": 1}).json()
    assert (body["default_version"], body["pinned"]) == (1, True)
    assert answered_by(http, "rolling") == (1, 0)
    assert answered_by(http, "rolling", version=2) == (2, 1)
    put_tiny(http, "rolling", seed=1)
    assert answered_by(http, "rolling") == (1, 0), "a pinned default stays"

    body = http.put(f"{url}/default", json={"version": None}).json()
    assert (body["default_version"], body["pinned"]) == (3, False)
    assert answered_by(http, "rolling") == (3, 1)

    assert http.delete(f"{url}/versions/3").status_code == 204
    assert answered_by(http, "rolling") == (2, 1)
    problem(http.get(f"{url}/versions/3"), 404, "version_not_found")
    assert [v["version"] for v in http.get(url).json()["versions"]] == [2, 1]

    assert http.delete(url).status_code == 204
    problem(http.get(url), 404, "model_not_found")
    problem(http.delete(url), 404, "model_not_found")
    gone = http.post(f"{url}/predict", content=tiny.npy(tiny.rows(1)), headers=NPY)
    problem(gone, 404, "model_not_found")


def test_only_ready_versions_become_default(http: httpx.Client, model: str) -> None:
    rejected = http.post(
        "/v1/models/never/versions", content=b"x", headers=OCTETS | {"Prefer": "wait=60"}
    )
    problem(rejected, 422, "not_a_checkpoint")
    problem(http.put("/v1/models/never/default", json={"version": 1}), 409, "conflict")
    problem(http.put(f"/v1/models/{model}/default", json={"version": 9}), 404, "version_not_found")
    problem(http.put("/v1/models/nobody/default", json={"version": 1}), 404, "model_not_found")


@pytest.mark.parametrize("body", [{}, {"version": "one"}, {"version": 0}, {"version": 1, "x": 1}])
def test_a_bad_choice_of_default_is_refused(
    http: httpx.Client, model: str, body: dict[str, object]
) -> None:
    answer = http.put(f"/v1/models/{model}/default", json=body)
    assert problem(answer, 422, "invalid_request")["errors"]


def test_lists_are_paged(small: httpx.Client) -> None:
    for number in range(5):
        small.post(f"/v1/models/page-{number}/versions", content=b"x", headers=OCTETS)
    names, path = [], "/v1/models"
    pages = 0
    while path is not None:
        page = small.get(path).json()
        assert 1 <= len(page["items"]) <= 2
        names += [item["name"] for item in page["items"]]
        path, pages = page["next"], pages + 1
    assert pages >= 3
    assert names == sorted(names)
    assert {f"page-{n}" for n in range(5)} <= set(names)
    assert len(small.get("/v1/models", params={"limit": 3}).json()["items"]) == 3
    problem(small.get("/v1/models", params={"limit": 4}), 422, "bad_input")
    problem(small.get("/v1/models", params={"limit": 0}), 422, "invalid_request")


def test_versions_are_paged_newest_first(small: httpx.Client) -> None:
    name = f"many-{uuid.uuid4().hex[:8]}"
    url = f"/v1/models/{name}/versions"
    for _ in range(5):  # waited for: a state that changes between two reads would be a difference
        small.post(url, content=b"x", headers=OCTETS | {"Prefer": "wait=60"})
    first = small.get(url).json()
    assert [item["version"] for item in first["items"]] == [5, 4]
    second = small.get(first["next"]).json()
    assert [item["version"] for item in second["items"]] == [3, 2]
    last = small.get(second["next"]).json()
    assert [item["version"] for item in last["items"]] == [1]
    assert last["next"] is None
    problem(small.get(url, params={"cursor": "x"}), 422, "bad_input")
    whole = small.get(f"/v1/models/{name}").json()
    assert [item["version"] for item in whole["versions"]] == [5, 4]
    assert small.get(whole["next"]).json()["items"] == second["items"]


@pytest.mark.parametrize("version", ["0", "-1", "x", "1.5", "99999999999"])
def test_a_version_is_a_number(http: httpx.Client, model: str, version: str) -> None:
    problem(http.get(f"/v1/models/{model}/versions/{version}"), 422, "invalid_request")


def test_a_version_deleted_while_it_converts_leaves_nothing(http: httpx.Client) -> None:
    put_tiny(http, "fleeting", ready=False)
    assert http.delete("/v1/models/fleeting/versions/1").status_code == 204
    put_tiny(http, "fleeting-after")  # by then the worker is through with the one before
    time.sleep(0.1)
    loaded = {each["model"] for each in http.get("/health").json()["models"]}
    assert "fleeting" not in loaded
    assert "fleeting-after" in loaded
