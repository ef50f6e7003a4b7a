"""Requests that are wrong: each is refused with a 4xx, the protocol's error object, and a code."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from tests.api import tiny
from tests.api.v2.test_infer import given

LENGTH = "Inference-Header-Content-Length"
ROWS = tiny.rows(1)
TENSOR = {"name": "input_0", "shape": [1, *tiny.SHAPE], "datatype": "FP32"}
BINARY = TENSOR | {"parameters": {"binary_data_size": ROWS.nbytes}}


def asked(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def sized(size: Any) -> dict[str, Any]:
    return TENSOR | {"parameters": {"binary_data_size": size}}


def classified(count: Any) -> dict[str, Any]:
    return {"name": "output_0", "parameters": {"classification": count}}


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["foldserve-code"] == code
    body = answer.json()
    assert list(body) == ["error"]
    text: str = body["error"]
    return text


def post(http: httpx.Client, model: str, body: bytes, **headers: str) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return http.post(f"/v2/models/{model}/infer", content=body, headers=headers)


HEAD = asked(BINARY)


def test_the_control_is_answered(http: httpx.Client, model: str) -> None:
    body = HEAD + ROWS.tobytes()
    answer = post(http, model, body, **{LENGTH: str(len(HEAD))})
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    found = np.array(output["data"]).reshape(output["shape"])
    truth = tiny.expected(ROWS)
    assert np.abs(found - truth).max() < 1e-4 * np.abs(truth).max()


FULL = HEAD + ROWS.tobytes()
ZEROS = TENSOR | {"data": [0] * 768}
MALFORMED: dict[str, tuple[bytes, int | str | None, str]] = {
    "truncated": (FULL[:-4], len(HEAD), "3068 are left"),
    "too long": (FULL + b"1234", len(HEAD), "4 bytes more"),
    "length short": (FULL, len(HEAD) - 1, "JSON cannot be read"),
    "length long": (FULL, len(HEAD) + 4, "JSON cannot be read"),
    "length beyond": (FULL, 10**9, "the body has"),
    "length negative": (FULL, "-1", "the body has"),
    "length endless": (FULL, "9" * 30, "the body has"),
    "no length": (FULL, None, "JSON cannot be read"),
    "length zero": (HEAD, 0, "JSON cannot be read"),
    "empty": (b"", None, "JSON cannot be read"),
    "deep": (b"[" * 100_000, None, "JSON cannot be read"),
    "a list": (b"[1]", None, "no object"),
    "no inputs": (asked(), None, "`inputs` is empty"),
    "input a number": (asked(3), None, "no list of objects"),
    "id a number": (asked(ZEROS, id=7), None, "`id` is no string"),
    "parameters a list": (asked(ZEROS, parameters=[1]), None, "no object"),
    "parameter a list": (asked(ZEROS, parameters={"a": []}), None, "neither number nor string"),
    "other form": (asked(ZEROS, parameters={"form": "odd"}), None, "neither deploy nor train"),
    "no data": (asked(TENSOR), None, "either `data` or"),
    "both data": (asked(BINARY | {"data": [1]}), None, "either `data` or"),
    "too few": (asked(TENSOR | {"data": [1, 2]}), None, "2 elements"),
    "ragged": (asked(TENSOR | {"data": [[1], [1, 2]]}), None, "ragged"),
    "strings": (asked(TENSOR | {"data": ["a"] * 768}), None, "not FP32"),
    "huge": (asked(TENSOR | {"data": [1e39] * 768}), None, "beyond FP32"),
    "data a number": (asked(TENSOR | {"data": 5}), None, "no list"),
    "rank": (asked(TENSOR | {"shape": [1, 3, 16], "data": [0] * 48}), None, "takes [N, 3"),
    "no rows": (asked(TENSOR | {"shape": [0, 3, 16, 16], "data": []}), None, "N >= 1"),
    "no size": (asked(ZEROS | {"shape": [True, 3, 16, 16]}), None, "no list of sizes"),
    "negative": (asked(ZEROS | {"shape": [-1, 3, 16, 16]}), None, "no list of sizes"),
    "bytes": (asked(ZEROS | {"datatype": "BYTES"}), None, "'BYTES'"),
    "datatype a number": (asked(ZEROS | {"datatype": 7}), None, "'7'"),
    "whole numbers": (asked(ZEROS | {"datatype": "INT32"}), None, "takes FP32"),
    "beyond": (asked(TENSOR | {"datatype": "UINT8", "data": [256]}), None, "beyond UINT8"),
    "bf16": (asked(ZEROS | {"datatype": "BF16"}), None, "no JSON form"),
    "odd size": (asked(sized(3)), None, "no size in bytes"),
    "negative size": (asked(sized(-4)), None, "no size in bytes"),
    "size a text": (asked(sized("4")), None, "no size in bytes"),
    "shared": (
        asked(TENSOR | {"parameters": {"shared_memory_region": "r"}}),
        None,
        "shared memory",
    ),
    "other name": (asked(ZEROS | {"name": "y"}), None, "the model takes ['input_0']"),
    "twice": (asked(ZEROS, ZEROS), None, "the model takes ['input_0']"),
    "other output": (asked(ZEROS, outputs=[{"name": "z"}]), None, "output 'z'"),
    "output twice": (asked(ZEROS, outputs=[{"name": "output_0"}] * 2), None, "asked for twice"),
    "classes": (asked(ZEROS, outputs=[classified(-1)]), None, "no count"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_requests(http: httpx.Client, model: str, what: str) -> None:
    body, length, words = MALFORMED[what]
    headers = {} if length is None else {LENGTH: str(length)}
    assert words in refused(post(http, model, body, **headers), 400, "bad_input")


def test_the_client_sees_the_words(client: triton.InferenceServerClient, model: str) -> None:
    with pytest.raises(InferenceServerException, match=r"takes \[N, 3, 16, 16\]") as caught:
        client.infer(model, [given(np.zeros((1, 3, 8, 8), np.float32))])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="takes FP32"):
        client.infer(model, [given(np.zeros((1, *tiny.SHAPE), np.int8))])
    with pytest.raises(InferenceServerException, match="beyond the range of FP32"):
        client.infer(model, [given(np.full((1, *tiny.SHAPE), 1e300))])


def test_compressed_bodies_that_lie(http: httpx.Client, model: str) -> None:
    whole = gzip.compress(HEAD + ROWS.tobytes())
    good = {LENGTH: str(len(HEAD)), "Content_Encoding": "gzip"}
    assert post(http, model, whole, **good).status_code == 200
    cut = refused(post(http, model, whole[:-9], **good), 400, "bad_input")
    assert "cut short" in cut
    more = refused(post(http, model, whole + b"more", **good), 400, "bad_input")
    assert "follows its end" in more
    refused(post(http, model, b"no gzip", **good), 400, "bad_input")
    refused(post(http, model, whole, Content_Encoding="deflate"), 400, "bad_input")
    refused(post(http, model, whole, Content_Encoding="br"), 415, "unsupported_media_type")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_bomb_is_refused_at_the_limit(small: httpx.Client, coding: str) -> None:
    squeeze = gzip.compress if coding == "gzip" else zlib.compress
    bomb = squeeze(bytes(30_000_000))
    assert len(bomb) < 40_000  # within the limit for bodies before it expands
    text = refused(post(small, "tiny", bomb, Content_Encoding=coding), 413, "upload_too_large")
    assert "40000" in text


def test_json_has_a_limit_of_its_own(small: httpx.Client) -> None:
    body = asked(TENSOR | {"data": [0.123456] * 3000})
    text = refused(post(small, "tiny", body), 413, "upload_too_large")
    assert "FOLDSERVE_MAX_JSON_BYTES" in text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2/models/nobody", 404, "model_not_found"),
        ("POST", "/v2/models/nobody/infer", 404, "model_not_found"),
        ("GET", "/v2/models/tiny/versions/9", 404, "version_not_found"),
        ("POST", "/v2/models/tiny/versions/9/infer", 404, "version_not_found"),
        ("POST", "/v2/models/tiny/versions/one/infer", 400, "bad_input"),
        ("GET", "/v2/models/tiny/versions/one", 400, "invalid_request"),
        ("GET", "/v2/models/Wrong Name", 400, "name_invalid"),
        ("GET", "/v2/nothing", 404, "not_found"),
        ("GET", "/v2/models/tiny/infer", 405, "method_not_allowed"),
    ],
)
def test_addresses_that_lead_nowhere(
    http: httpx.Client, model: str, method: str, path: str, status: int, code: str
) -> None:
    refused(http.request(method, path), status, code)


def test_other_routes_keep_their_problem_documents(http: httpx.Client, model: str) -> None:
    for path in ("/v1/models/nobody", "/v2x"):
        assert http.get(path).headers["content-type"] == "application/problem+json"
