"""Metadata, readiness, statistics and the repository through the protocol's reference client."""

from __future__ import annotations

import httpx
import pytest
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from tests.api import tiny
from tests.api.conftest import put_tiny
from tests.api.problem import problem
from tests.api.v2.test_infer import given, is_right


def test_the_server_tells_what_it_is(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "foldserve"
    assert {"binary_tensor_data", "model_repository"} <= set(metadata["extensions"])


def test_a_model_tells_its_inputs_and_outputs(
    client: triton.InferenceServerClient, model: str
) -> None:
    assert client.get_model_metadata(model) == {
        "name": model,
        "versions": ["1"],
        "platform": "foldserve",
        "inputs": [{"name": "input_0", "datatype": "FP32", "shape": [-1, *tiny.SHAPE]}],
        "outputs": [{"name": "output_0", "datatype": "FP32", "shape": [-1, tiny.CLASSES]}],
    }
    assert client.get_model_metadata(model, "1")["name"] == model
    config = client.get_model_config(model)
    assert config["input"] == [
        {"name": "input_0", "data_type": "TYPE_FP32", "dims": list(tiny.SHAPE)}
    ]
    assert config["max_batch_size"] >= 1
    assert client.is_model_ready(model)
    assert client.is_model_ready(model, "1")
    assert not client.is_model_ready(model, "9")
    assert not client.is_model_ready("nobody")


def test_statistics_count_rows(client: triton.InferenceServerClient, http: httpx.Client) -> None:
    put_tiny(http, "counted")
    for count in (1, 3):
        client.infer("counted", [given(tiny.rows(count))])
    (stats,) = client.get_inference_statistics("counted")["model_stats"]
    assert (stats["name"], stats["version"]) == ("counted", "1")
    assert (stats["inference_count"], stats["execution_count"]) == (4, 2)
    assert stats["inference_stats"]["success"]["count"] == 2
    assert stats["inference_stats"]["compute_infer"]["ns"] > 0
    assert stats["inference_stats"]["queue"]["count"] == 2
    assert 0 < stats["inference_stats"]["queue"]["ns"] < 60e9
    assert [each["batch_size"] for each in stats["batch_stats"]] == [1, 3]
    everything = client.get_inference_statistics()["model_stats"]
    assert "counted" in {each["name"] for each in everything}


def entry(client: triton.InferenceServerClient, name: str, version: str) -> dict[str, str]:
    index = client.get_model_repository_index()
    (found,) = [each for each in index if (each["name"], each["version"]) == (name, version)]
    found_entry: dict[str, str] = found
    return found_entry


def test_a_model_is_unloaded_and_loaded(
    client: triton.InferenceServerClient, http: httpx.Client
) -> None:
    put_tiny(http, "shelf", seed=3)
    rows = tiny.rows(2)
    assert entry(client, "shelf", "1")["state"] == "READY"

    client.unload_model("shelf")
    assert entry(client, "shelf", "1") == {
        "name": "shelf",
        "version": "1",
        "state": "UNAVAILABLE",
        "reason": "unloaded",
    }
    assert not client.is_model_ready("shelf")
    for version in ("", "1"):
        with pytest.raises(InferenceServerException, match="taken out of serving") as caught:
            client.infer("shelf", [given(rows)], model_version=version)
        assert caught.value.status() == "409"
    answer = http.post(
        "/v1/models/shelf/predict", content=tiny.npy(rows), headers={"Content-Type": tiny.NPY}
    )
    problem(answer, 409, "model_unloaded")
    # A version that comes meanwhile is converted, and serves only once the model is loaded.
    put_tiny(http, "shelf", seed=4)
    assert entry(client, "shelf", "2")["reason"] == "unloaded"
    assert not client.is_model_ready("shelf")

    client.load_model("shelf")
    assert entry(client, "shelf", "2")["state"] == "READY"
    assert is_right(client.infer("shelf", [given(rows)]).as_numpy("output_0"), rows, seed=4)
    first = client.infer("shelf", [given(rows)], model_version="1")
    assert is_right(first.as_numpy("output_0"), rows, seed=3)
    client.load_model("shelf")  # again changes nothing
    assert client.is_model_ready("shelf")


def test_the_index_tells_why_a_version_does_not_serve(
    client: triton.InferenceServerClient, http: httpx.Client
) -> None:
    answer = http.post(
        "/v1/models/broken/versions",
        content=b"not a checkpoint",
        headers={"Prefer": "wait=60", "Content-Type": "application/octet-stream"},
    )
    assert answer.status_code == 422, answer.text
    found = entry(client, "broken", "1")
    assert found["state"] == "UNAVAILABLE"
    assert found["reason"] == answer.json()["detail"]
    with pytest.raises(InferenceServerException, match="no version that is ready"):
        client.load_model("broken")
    ready = http.post("/v2/repository/index", json={"ready": True}).json()
    assert all(each["state"] == "READY" for each in ready)


def test_what_load_and_unload_refuse(client: triton.InferenceServerClient, model: str) -> None:
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.load_model("nobody")
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.unload_model("nobody")
    with pytest.raises(InferenceServerException, match="'config' is not taken"):
        client.load_model(model, config="{}")
    assert client.is_model_ready(model)


def test_the_protocol_is_in_the_documentation(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    infer = paths["/v2/models/{name}/infer"]["post"]
    assert "application/json" in infer["requestBody"]["content"]
    assert {"200", "400", "404", "409", "413", "429"} <= set(infer["responses"])
    assert "/v2/repository/index" in paths
