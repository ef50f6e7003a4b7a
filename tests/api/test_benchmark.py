from __future__ import annotations

import httpx

from tests.api.problem import problem


def test_measure_then_read_it_back_and_in_health(small: httpx.Client) -> None:
    url = "/v1/models/tiny/benchmark"
    answer = small.post(url, json={"batch_sizes": [2, 1], "seconds": 2})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model"], body["version"]) == ("tiny", 1)
    assert body["precision"] == "float32"
    assert body["backend"]
    assert body["device"]
    assert [batch["batch_size"] for batch in body["batches"]] == [1, 2]
    for batch in body["batches"]:
        for form in ("train", "deploy"):
            quantiles = batch[form]
            assert 0 < quantiles["p5_ms"] <= quantiles["median_ms"] <= quantiles["p95_ms"]
        ratio = batch["train"]["median_ms"] / batch["deploy"]["median_ms"]
        assert abs(batch["speedup"] / ratio - 1) < 1e-9
        assert batch["speedup_interval"]["low"] <= batch["speedup"]
        assert batch["control"]["ratio"] > 0
        claimed = batch["verdict"] in ("faster", "slower")
        assert (batch["saving_percent"] is not None) == claimed

    assert small.get(url).json() == body
    (served,) = [m for m in small.get("/health").json()["models"] if m["model"] == "tiny"]
    saving = served["latency_saving"]
    assert [batch["batch_size"] for batch in saving["batches"]] == [1, 2]
    assert saving["batches"][0]["train_ms"] == body["batches"][0]["train"]["median_ms"]
    assert saving["batches"][0]["speedup"] == body["batches"][0]["speedup"]


def test_before_it_was_measured(http: httpx.Client, model: str) -> None:
    body = problem(http.get(f"/v1/models/{model}/benchmark"), 409, "version_not_ready")
    assert "POST" in body["remedy"]
    (served,) = [m for m in http.get("/health").json()["models"] if m["model"] == model]
    assert served["latency_saving"] is None


def test_limits_of_a_measurement(small: httpx.Client) -> None:
    url = "/v1/models/tiny/benchmark"
    rows = small.post(url, json={"batch_sizes": [5]})
    assert "FOLDSERVE_MAX_BATCH" in problem(rows, 422, "bad_input")["remedy"]
    long = small.post(url, json={"seconds": 3})
    assert "FOLDSERVE_BENCHMARK_SECONDS" in problem(long, 422, "bad_input")["remedy"]
    for body in ({"batch_sizes": []}, {"batch_sizes": [0]}, {"seconds": 0}, {"batch": 1}):
        problem(small.post(url, json=body), 422, "invalid_request")
    problem(small.post("/v1/models/nobody/benchmark"), 404, "model_not_found")
    problem(small.get("/v1/models/nobody/benchmark"), 404, "model_not_found")
