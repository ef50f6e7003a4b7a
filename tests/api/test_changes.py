"""Labels and preprocessing changed after the upload, over HTTP."""

from __future__ import annotations

import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.api import tiny
from tests.api.conftest import put_tiny
from tests.api.problem import problem
from tests.api.test_predict import encoded, picture

PATH = "/v1/models/changing/versions/1"
FIVE = ["one", "two", "three", "four", "five"]
ARRAYS = {"Accept": "application/vnd.foldserve.arrays+json", "Content-Type": "image/png"}


@pytest.fixture(scope="module", autouse=True)
def changing(server: Any) -> None:
    with httpx.Client(base_url=server.url, timeout=120) as client:
        put_tiny(client, "changing")


def top(http: httpx.Client) -> str:
    answer = http.post(
        "/v1/models/changing/predict",
        content=tiny.npy(tiny.rows(1)),
        headers={"Content-Type": tiny.NPY},
    )
    label: str = answer.json()["predictions"][0]["top"][0]["label"]
    return label


def seen(http: httpx.Client) -> np.ndarray:
    """The network's outputs for a picture."""
    answer = http.post(
        "/v1/models/changing/predict", content=encoded(picture(), "PNG"), headers=ARRAYS
    )
    assert answer.status_code == 200, answer.text
    return np.asarray(answer.json()["outputs"][0]["data"])


def expected(mean: list[float], std: list[float], *, bgr: bool = False) -> np.ndarray:
    """The training form's outputs for the picture, scaled whole and then normalised."""
    image = Image.open(io.BytesIO(encoded(picture(), "PNG")))
    scaled = image.resize((tiny.SIDE, tiny.SIDE), Image.Resampling.BILINEAR)
    values = np.asarray(scaled, dtype=np.float64) / 255
    values = values[:, :, ::-1] if bgr else values
    row = ((values - mean) / std).transpose(2, 0, 1)[None]
    return tiny.expected(row.astype(np.float32))


def test_labels_are_changed_at_once_and_taken_back(http: httpx.Client) -> None:
    index = int(np.argmax(tiny.expected(tiny.rows(1))))
    assert top(http) == tiny.CONFIG["labels"][index]
    answer = http.patch(PATH, json={"labels": FIVE})
    assert answer.status_code == 200, answer.text
    assert answer.json()["config"]["labels"] == FIVE
    assert answer.json()["config"]["input_shape"] == list(tiny.SHAPE)  # the others stay
    assert top(http) == FIVE[index]
    assert http.get(PATH).json()["config"]["labels"] == FIVE
    assert http.patch(PATH, json={"labels": None}).json()["config"]["labels"] is None
    assert top(http) == str(index)


def test_preprocessing_is_changed_at_once(http: httpx.Client) -> None:
    before = seen(http)
    answer = http.patch(PATH, json={"preprocessing": "cifar10"})
    assert answer.status_code == 200, answer.text
    how = answer.json()["preprocessing"]
    assert (how["origin"], how["crop"], how["mean"][0]) == ("preset cifar10", "none", 0.4914)
    truth = expected([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert np.abs(seen(http) - truth).max() < 1e-2 * np.abs(truth).max()
    assert np.abs(before - truth).max() > 1e-2 * np.abs(truth).max()  # the control

    own = {"preset": "cifar10", "channel_order": "bgr", "mean": [0.5], "std": [0.25]}
    answer = http.patch(PATH, json={"preprocessing": own})
    assert answer.status_code == 200, answer.text
    truth = expected([0.5] * 3, [0.25] * 3, bgr=True)
    assert np.abs(seen(http) - truth).max() < 1e-2 * np.abs(truth).max()

    http.patch(PATH, json={"preprocessing": None})
    assert np.abs(seen(http) - before).max() == 0
    assert http.get(PATH).json()["preprocessing"]["origin"] == "ImageNet preset"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "config"),
        ({"backend": "torch"}, "backend"),
        ({"labels": ["a"]}, "labels"),
        ({"labels": [1] * 5}, "labels.0"),
        ({"preprocessing": "imagenet21"}, "preprocessing.preset"),
        ({"preprocessing": {"mean": [0.1, 0.2]}}, "preprocessing"),
        ({"preprocessing": {"std": [0]}}, "preprocessing.std.0"),
        ([], "config"),
    ],
)
def test_wrong_changes_change_nothing(http: httpx.Client, body: Any, field: str) -> None:
    before = http.get(PATH).json()["config"]
    assert problem(http.patch(PATH, json=body), 422, "invalid_config")["field"] == field
    assert http.get(PATH).json()["config"] == before


def test_other_refusals(http: httpx.Client, small: httpx.Client) -> None:
    labels = {"labels": FIVE}
    problem(http.patch("/v1/models/nobody/versions/1", json=labels), 404, "model_not_found")
    problem(http.patch("/v1/models/changing/versions/9", json=labels), 404, "version_not_found")
    text = {"Content-Type": "text/plain"}
    problem(http.patch(PATH, content=b"{}", headers=text), 415, "unsupported_media_type")
    long = {"labels": ["x" * 300] * 5}
    problem(small.patch("/v1/models/tiny/versions/1", json=long), 413, "upload_too_large")


def test_a_restart_keeps_the_change(http: httpx.Client) -> None:
    """What is loaded anew reads the same from the catalog."""
    http.patch(PATH, json={"labels": FIVE})
    http.post("/v2/repository/models/changing/unload")
    assert http.post("/v2/repository/models/changing/load").status_code == 200
    assert top(http) in FIVE
