from __future__ import annotations

import io
import json
import socket
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api import images
from service.graph import save_program
from tests.api import tiny
from tests.api.problem import problem
from tests.running import RunningServer
from tests.serving import pair

NPY = {"Content-Type": tiny.NPY, "Accept": tiny.NPY}
CLOSE = 1e-4


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("form", ["deploy", "train"])
@pytest.mark.parametrize("count", [1, 3, 70])
def test_npy_in_and_out_equals_the_training_form(
    http: httpx.Client, model: str, form: str, count: int
) -> None:
    rows = tiny.rows(count)
    answer = http.post(
        f"/v1/models/{model}/predict", params={"form": form}, content=tiny.npy(rows), headers=NPY
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == tiny.NPY
    assert answer.headers["foldserve-version"] == "1"
    found = tiny.from_npy(answer.content)
    assert found.dtype == np.float32
    truth = tiny.expected(rows)
    assert np.abs(found - truth).max() < CLOSE * np.abs(truth).max()
    # The control: other weights are told apart.
    assert np.abs(found - tiny.expected(rows, seed=1)).max() > CLOSE * np.abs(truth).max()


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
def test_other_floats_and_orders_are_converted(http: httpx.Client, model: str, dtype: str) -> None:
    rows = tiny.rows(2).astype(np.float16).astype(np.float32)
    for array in (rows.astype(dtype), np.asfortranarray(rows.astype(dtype))):
        answer = http.post(f"/v1/models/{model}/predict", content=tiny.npy(array), headers=NPY)
        truth = tiny.expected(rows)
        assert np.abs(tiny.from_npy(answer.content) - truth).max() < CLOSE * np.abs(truth).max()


@pytest.mark.parametrize("count", [1, 5])
def test_grey_levels_in_an_array_are_what_an_image_file_holds(
    http: httpx.Client, model: str, count: int
) -> None:
    channels, height, width = tiny.SHAPE
    pictures = [picture(width, height, seed) for seed in range(count)]
    levels = np.stack([np.asarray(each) for each in pictures])
    assert levels.shape == (count, height, width, channels)
    url = f"/v1/models/{model}/predict"
    raw = http.post(url, content=tiny.npy(levels), headers=NPY)
    assert raw.status_code == 200, raw.text
    files = [
        ("image", (f"{i}.png", encoded(p, "PNG"), "image/png")) for i, p in enumerate(pictures)
    ]
    told = http.post(url, files=files, headers={"Accept": tiny.NPY})
    assert np.allclose(tiny.from_npy(raw.content), tiny.from_npy(told.content), rtol=1e-5)
    # The control: other channels, another answer.
    turned = http.post(url, content=tiny.npy(levels[..., ::-1].copy()), headers=NPY)
    assert not np.allclose(tiny.from_npy(turned.content), tiny.from_npy(raw.content), rtol=1e-3)


def test_grey_levels_of_another_shape_are_refused(http: httpx.Client, model: str) -> None:
    planes = np.zeros((1, *tiny.SHAPE), np.uint8)
    answer = http.post(f"/v1/models/{model}/predict", content=tiny.npy(planes), headers=NPY)
    channels, height, width = tiny.SHAPE
    told = problem(answer, 422, "bad_input")
    assert told["expected"] == ["N", height, width, channels]


def test_more_grey_levels_than_can_wait_are_refused_before_they_grow(
    http: httpx.Client, model: str
) -> None:
    channels, height, width = tiny.SHAPE
    many = np.zeros((1025, height, width, channels), np.uint8)
    answer = http.post(f"/v1/models/{model}/predict", content=tiny.npy(many), headers=NPY)
    told = problem(answer, 422, "bad_input")
    assert told["detail"] == "The request has 1025 rows; at most 1024 can wait."


def test_json_answers_labels_and_scores(http: httpx.Client, model: str) -> None:
    rows = tiny.rows(2)
    answer = http.post(
        f"/v1/models/{model}/predict", params={"top_k": 3}, json={"inputs": rows.tolist()}
    )
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["model"], body["version"], body["form"]) == (model, 1, "deploy")
    scores = softmax(tiny.expected(rows))
    for row, truth in zip(body["predictions"], scores, strict=True):
        order = np.argsort(-truth)[:3]
        assert [each["index"] for each in row["top"]] == order.tolist()
        assert [each["label"] for each in row["top"]] == [tiny.CONFIG["labels"][i] for i in order]
        assert np.allclose([each["score"] for each in row["top"]], truth[order], atol=1e-4)


def test_one_row_needs_no_batch_axis(http: httpx.Client, model: str) -> None:
    url, rows = f"/v1/models/{model}/predict", tiny.rows(1)
    plain = http.post(url, json={"inputs": rows[0].tolist()})
    assert len(plain.json()["predictions"]) == 1
    assert tiny.from_npy(http.post(url, content=tiny.npy(rows[0]), headers=NPY).content).shape == (
        1,
        tiny.CLASSES,
    )


def test_arrays_on_request(http: httpx.Client, model: str) -> None:
    rows = tiny.rows(2)
    kind = "application/vnd.foldserve.arrays+json"
    answer = http.post(
        f"/v1/models/{model}/predict", json={"inputs": rows.tolist()}, headers={"Accept": kind}
    )
    assert answer.headers["content-type"] == kind
    (output,) = answer.json()["outputs"]
    assert output["shape"] == [2, tiny.CLASSES]
    assert np.allclose(output["data"], tiny.expected(rows), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "media"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")]
)
def test_an_image_is_decoded_and_preprocessed(
    http: httpx.Client, model: str, kind: str, media: str
) -> None:
    data = encoded(picture(), kind)
    answer = http.post(
        f"/v1/models/{model}/predict",
        params={"top_k": tiny.CLASSES},
        content=data,
        headers={"Content-Type": media},
    )
    assert answer.status_code == 200, answer.text
    how = images.recipe(tiny.SHAPE, None)
    assert how is not None
    truth = softmax(tiny.expected(images.decode(data, how, 10**6)[None]))[0]
    found = {each["index"]: each["score"] for each in answer.json()["predictions"][0]["top"]}
    assert np.allclose([found[i] for i in range(tiny.CLASSES)], truth, atol=1e-4)


def test_several_images_keep_their_order(http: httpx.Client, model: str) -> None:
    url = f"/v1/models/{model}/predict"
    files = [encoded(picture(seed=seed), "PNG") for seed in range(4)]
    together = http.post(
        url, files=[("image", (f"{n}.png", data, "image/png")) for n, data in enumerate(files)]
    ).json()["predictions"]
    for data, row in zip(files, together, strict=True):
        alone = http.post(url, content=data, headers={"Content-Type": "image/png"}).json()
        (one,) = alone["predictions"]
        assert [each["index"] for each in one["top"]] == [each["index"] for each in row["top"]]
        scores = [[each["score"] for each in each_row["top"]] for each_row in (one, row)]
        assert np.allclose(*scores, atol=1e-4)
    assert together[0] != together[1]


@pytest.mark.parametrize(
    ("body", "kind", "status", "code", "word"),
    [
        (b"x", "", 415, "unsupported_media_type", "no Content-Type"),
        (b"x", "text/plain", 415, "unsupported_media_type", "text/plain"),
        (b"x", "image/png", 422, "bad_input", "decoded"),
        (b"", "image/jpeg", 422, "bad_input", "decoded"),
        (b"GIF89a" + bytes(60), "image/png", 422, "bad_input", "decoded"),
        (b"{", tiny.JSON, 422, "bad_input", "JSON"),
        (b"[1]", tiny.JSON, 422, "bad_input", "inputs"),
        (b'{"inputs": [[1, 2], [3]]}', tiny.JSON, 422, "bad_input", "ragged"),
        (b'{"inputs": "abc"}', tiny.JSON, 422, "bad_input", "number"),
        (b'{"inputs": [null]}', tiny.JSON, 422, "bad_input", "number"),
        (b'{"inputs": []}', tiny.JSON, 422, "bad_input", "shape"),
        (b'{"inputs": [1], "x": 2}', tiny.JSON, 422, "bad_input", "'x'"),
        (b"x", tiny.NPY, 422, "bad_input", "npy"),
        (b"", tiny.NPY, 422, "bad_input", "npy"),
        (tiny.npy(np.zeros((1, 3, 4, 4), np.float32)), tiny.NPY, 422, "bad_input", "[1, 3, 4, 4]"),
        (tiny.npy(np.zeros((0, *tiny.SHAPE), np.float32)), tiny.NPY, 422, "bad_input", "[0, 3"),
        (tiny.npy(np.zeros((1, *tiny.SHAPE), np.int64)), tiny.NPY, 422, "bad_input", "int64"),
        (tiny.npy(tiny.rows(1))[:-1], tiny.NPY, 422, "bad_input", "claims"),
        (tiny.npy(tiny.rows(1)) + b"x", tiny.NPY, 422, "bad_input", "claims"),
    ],
)
def test_bad_bodies_are_refused(
    http: httpx.Client, model: str, body: bytes, kind: str, status: int, code: str, word: str
) -> None:
    headers = {"Content-Type": kind} if kind else {}
    answer = http.post(f"/v1/models/{model}/predict", content=body, headers=headers)
    assert word in problem(answer, status, code)["detail"]


def test_a_pickled_npy_is_never_loaded(http: httpx.Client, model: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    answer = http.post(
        f"/v1/models/{model}/predict",
        content=buffer.getvalue(),
        headers={"Content-Type": tiny.NPY},
    )
    assert "object" in problem(answer, 422, "bad_input")["detail"]


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ({"form": "both"}, "form"),
        ({"version": "0"}, "version"),
        ({"version": "-1"}, "version"),
        ({"version": "1e3"}, "version"),
        ({"top_k": "0"}, "top_k"),
        ({"topk": "3"}, "topk"),
    ],
)
def test_bad_queries_are_refused(
    http: httpx.Client, model: str, query: dict[str, str], word: str
) -> None:
    answer = http.post(
        f"/v1/models/{model}/predict", params=query, content=tiny.npy(tiny.rows(1)), headers=NPY
    )
    assert word in problem(answer, 422, "bad_input")["detail"]


def test_what_is_not_there_is_not_found(http: httpx.Client, model: str) -> None:
    body = tiny.npy(tiny.rows(1))
    missing = http.post("/v1/models/nobody/predict", content=body, headers=NPY)
    problem(missing, 404, "model_not_found")
    version = http.post(f"/v1/models/{model}/predict?version=99", content=body, headers=NPY)
    problem(version, 404, "version_not_found")
    name = http.post("/v1/models/No/predict", content=body, headers=NPY)
    problem(name, 422, "name_invalid")


def test_limits_of_a_prediction(small: httpx.Client) -> None:
    url = "/v1/models/tiny/predict"
    large = problem(small.post(url, content=bytes(40_001), headers=NPY), 413, "upload_too_large")
    assert "FOLDSERVE_MAX_BODY_BYTES" in large["remedy"]
    text = json.dumps({"inputs": [1] * 10_000})
    long = small.post(url, content=text, headers={"Content-Type": tiny.JSON})
    assert "FOLDSERVE_MAX_JSON_BYTES" in problem(long, 413, "upload_too_large")["remedy"]
    wide = encoded(picture(101, 100), "PNG")
    pixels = small.post(url, content=wide, headers={"Content-Type": "image/png"})
    assert problem(pixels, 413, "image_too_large")["limit"] == 10_000
    many = [("image", ("a.png", encoded(picture(8, 8), "PNG"), "image/png"))] * 4
    assert (
        "FOLDSERVE_MAX_IMAGES" in problem(small.post(url, files=many), 422, "bad_input")["remedy"]
    )
    rows = small.post(url, content=tiny.npy(tiny.rows(5)), headers=NPY)
    assert "4" in problem(rows, 422, "bad_input")["detail"]
    # The control: exactly at the limits.
    at_limit = encoded(picture(100, 100), "PNG")
    assert small.post(url, content=at_limit, headers={"Content-Type": "image/png"}).is_success
    assert small.post(url, files=many[:3]).is_success
    assert small.post(url, content=tiny.npy(tiny.rows(4)), headers=NPY).is_success


def test_a_form_of_other_files_is_refused(http: httpx.Client, model: str) -> None:
    url = f"/v1/models/{model}/predict"
    answer = http.post(url, files={"image": ("a.txt", b"text", "text/plain")})
    problem(answer, 415, "unsupported_media_type")
    empty = http.post(
        url, content=b"--b--\r\n", headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    problem(empty, 422, "bad_input")


def test_a_stalled_body_is_given_up(small_server: RunningServer) -> None:
    host, port = small_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(
            b"POST /v1/models/tiny/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
            b"Content-Type: application/x-npy\r\n\r\n"
        )
        started = time.monotonic()
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 10


def test_the_reported_preprocessing_is_the_one_applied(http: httpx.Client, model: str) -> None:
    told = http.get(f"/v1/models/{model}/versions/1").json()["preprocessing"]
    assert told["origin"] == "ImageNet preset"
    assert told["resize"] == tiny.SIDE
    assert told["mean"] == list(images.IMAGENET_MEAN)


def test_a_request_may_ask_where_its_time_went(http: httpx.Client, model: str) -> None:
    path, body = f"/v1/models/{model}/predict", tiny.npy(tiny.rows(2))
    answer = http.post(path, params={"timing": "true"}, content=body, headers=NPY)
    queue, compute, batch = answer.headers["server-timing"].split(", ")
    assert float(queue.removeprefix("queue;dur=")) >= 0
    assert float(compute.removeprefix("compute;dur=")) > 0
    assert batch == 'batch;desc="2 rows"'
    assert "server-timing" not in http.post(path, content=body, headers=NPY).headers
    problem(http.post(path, params={"timing": "1"}, content=body, headers=NPY), 422, "bad_input")


@pytest.fixture(scope="module")
def pair_model(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a model with two inputs and three outputs."""
    path = tmp_path_factory.mktemp("pair") / "pair.bundle"
    save_program(pair.program(), path)
    answer = httpx.post(
        f"{server.url}/v1/models/pair/versions",
        files={"checkpoint": ("pair.bundle", path.read_bytes())},
        headers={"Prefer": "wait=100"},
        timeout=120,
    )
    assert answer.status_code == 201, answer.text
    return "pair"


def test_several_inputs_go_by_name(http: httpx.Client, pair_model: str) -> None:
    x, y = pair.rows(1, 5, 2)
    body = {"inputs": {"input_1": y.tolist(), "input_0": x.tolist()}}
    answer = http.post(f"/v1/models/{pair_model}/predict", json=body)
    assert answer.status_code == 200, answer.text
    scaled, more, large = answer.json()["outputs"]
    assert (scaled["shape"], more["shape"], large["shape"]) == ([3, 2, 4, 4], [3], [3])
    assert more["data"] == [2, 6, 3]
    assert large["data"] == [False, True, False]
    assert np.array_equal(scaled["data"], (x * y[:, None, None, None]).numpy())


def test_several_inputs_that_do_not_fit_are_refused(http: httpx.Client, pair_model: str) -> None:
    url = f"/v1/models/{pair_model}/predict"
    x, y = (column.tolist() for column in pair.rows(1))
    for inputs, word in (
        (x, "input_1"),
        ({"input_0": x}, "input_1"),
        ({"input_0": x, "input_1": y, "z": y}, "z"),
        ({"input_0": x, "input_1": [0.5]}, "type"),
        ({"input_0": x, "input_1": [1, 2]}, "rows"),
    ):
        refused = problem(http.post(url, json={"inputs": inputs}), 422, "bad_input")
        assert word in refused["detail"]
    array = http.post(url, content=tiny.npy(np.ones((1, 2, 4, 4), np.float32)), headers=NPY)
    assert "input_1 (torch.int64)" in problem(array, 422, "bad_input")["detail"]
