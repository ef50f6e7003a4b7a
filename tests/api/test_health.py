from __future__ import annotations

import json
import re

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service import __version__
from service.api.families import OUTCOMES
from service.checkpoint.child import sandbox_features
from tests.api import tiny
from tests.running import ROOT


def samples(http: httpx.Client) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Every sample: name -> labels -> value. Parsing it checks the format."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def test_live_and_ready(http: httpx.Client) -> None:
    assert http.get("/health/live").json() == {"status": "ok"}
    assert http.get("/health/ready").status_code == 200


def test_health_tells_what_is_served_and_how(http: httpx.Client, model: str) -> None:
    body = http.get("/health").json()
    assert body["status"] == "ok"
    assert body["version"] == __version__
    assert body["checks"] == {"catalog": True, "worker": True}
    assert body["failures"] == []
    assert body["versions"]["ready"] >= 1
    (served,) = [each for each in body["models"] if each["model"] == model]
    assert (served["version"], served["default"]) == (1, True)
    deploy = served["forms"]["deploy"]
    assert deploy["precision"] == "float32"
    assert deploy["weight_bytes"] > 0
    assert deploy["batch_sizes"][-1] == 32


def test_health_tells_what_confines_conversions(http: httpx.Client, model: str) -> None:
    """The same that a child of this very process says of itself."""
    assert http.get("/health").json()["sandbox"] == sandbox_features()


def test_metrics_count_requests_and_predictions(http: httpx.Client, model: str) -> None:
    def counts() -> tuple[float, float, float, float]:
        found = samples(http)
        requests = found.get("foldserve_http_requests_total", {})
        route = ("route", "/v1/models/{name}/predict")
        key = (("method", "POST"), route)
        of_model = [
            value
            for labels, value in found["foldserve_predictions_total"].items()
            if {("model", model), ("form", "deploy"), ("outcome", "answered")} <= set(labels)
        ]
        rows = [
            value
            for labels, value in found["foldserve_rows_total"].items()
            if {("model", model), ("form", "deploy")} <= set(labels)
        ]
        return (
            requests.get((*key, ("status", "200")), 0),
            requests.get((*key, ("status", "422")), 0),
            sum(of_model),
            sum(rows),
        )

    before = counts()
    url = f"/v1/models/{model}/predict"
    headers = {"Content-Type": tiny.NPY}
    for _ in range(3):
        http.post(url, content=tiny.npy(tiny.rows(2)), headers=headers)
    http.post(url, content=b"x", headers=headers)
    after = counts()
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 3, 6]


def test_invented_paths_and_methods_make_no_series(http: httpx.Client) -> None:
    for number in range(3):
        http.get(f"/invented/{number}")
        http.request("BREW", f"/v1/models/coffee-{number}")
    labels = samples(http)["foldserve_http_requests_total"]
    routes = {dict(label)["route"] for label in labels}
    assert "unmatched" in routes
    assert not any("invented" in route or "coffee" in route for route in routes)
    assert "BREW" not in {dict(label)["method"] for label in labels}


def test_outcomes_add_up_to_requests(http: httpx.Client, model: str) -> None:
    headers = {"Content-Type": tiny.NPY}
    for _ in range(4):
        http.post(f"/v1/models/{model}/predict", content=tiny.npy(tiny.rows(3)), headers=headers)
    found = samples(http)
    requests = found["foldserve_prediction_requests_total"]
    assert requests
    for labels, value in requests.items():
        parts = [
            found["foldserve_predictions_total"][tuple(sorted((*labels, ("outcome", outcome))))]
            for outcome in OUTCOMES
        ]
        assert sum(parts) == value, labels
        assert found["foldserve_queue_seconds_count"][labels] == value
        assert found["foldserve_batch_rows_sum"][labels] == found["foldserve_rows_total"][labels]
        batches, rows = (found[f"foldserve_batch_rows_{what}"][labels] for what in ("count", "sum"))
        assert (batches > 0) == (rows > 0)
        assert batches <= rows


def test_conversions_are_counted_by_result(http: httpx.Client, model: str) -> None:
    def count(result: str) -> float:
        return samples(http)["foldserve_conversion_seconds_count"][(("result", result),)]

    before, ready = count("rejected"), count("ready")
    assert ready >= 1
    http.post(
        "/v1/models/metered/versions",
        content=b"no checkpoint",
        headers={"Content-Type": "application/octet-stream", "Prefer": "wait=120"},
    )
    assert count("rejected") == before + 1
    assert count("ready") == ready


def test_the_dashboard_asks_for_series_that_exist(http: httpx.Client, model: str) -> None:
    row = tiny.npy(tiny.rows(1))
    http.post(f"/v1/models/{model}/predict", content=row, headers={"Content-Type": tiny.NPY})
    dashboard = json.loads((ROOT / "deploy/grafana/foldserve.json").read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    named = {
        name for query in queries for name in re.findall(r"\b(?:foldserve|process)_\w+", query)
    }
    assert len(queries) >= 10
    only_on_a_gpu = {"foldserve_device_memory_bytes"}
    assert named - samples(http).keys() - only_on_a_gpu == set()
