from __future__ import annotations

import json
from typing import Any

import httpx

from tests.api.conftest import put_tiny
from tests.api.problem import problem


def read(http: httpx.Client, url: str, last: int | None = None) -> list[dict[str, Any]]:
    """Every event of a stream until it ends by itself."""
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    found: list[dict[str, Any]] = []
    with http.stream("GET", url, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
            elif "data" in fields:
                data = json.loads(fields["data"])
                found.append({"id": int(fields["id"]), "event": fields["event"], "data": data})
                fields = {}
    return found


def test_progress_is_told_live_and_ends_with_ready(http: httpx.Client) -> None:
    put_tiny(http, "followed", ready=False)
    url = "/v1/models/followed/versions/1/events"
    events = read(http, url)
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    states = [e["data"]["state"] for e in events if e["event"] == "state"]
    assert states == ["queued", "converting", "ready"]
    stages = [e["data"]["stage"] for e in events if e["event"] == "progress"]
    seen = list(dict.fromkeys(stages))
    assert seen[0] == "read"
    assert {"recognise", "build", "fuse", "certify", "write"} <= set(seen)
    counted = [e["data"] for e in events if e["data"].get("stage") == "certify"]
    assert counted[-1]["done"] == counted[-1]["total"] == 5

    assert read(http, url, last=3) == events[3:]
    assert read(http, url, last=len(events)) == []
    assert read(http, url, last=10**9) == []


def test_a_rejected_version_ends_its_stream(http: httpx.Client) -> None:
    url = "/v1/models/followed-wrong/versions"
    http.post(url, content=b"x", headers={"Content-Type": "application/octet-stream"})
    last = read(http, f"{url}/1/events")[-1]
    assert (last["event"], last["data"]["state"]) == ("state", "rejected")
    assert last["data"]["code"] == "not_a_checkpoint"


def test_what_is_not_there_is_a_problem(http: httpx.Client, model: str) -> None:
    problem(http.get("/v1/models/nobody/versions/1/events"), 404, "model_not_found")
    url = f"/v1/models/{model}/versions/1/events"
    problem(http.get(url, headers={"Last-Event-ID": "x"}), 422, "bad_input")
