"""Every way in which a file can be wrong has a problem of its own, and nothing is lost."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from io import BytesIO

import httpx
import pytest
import torch

from tests.api import tiny
from tests.api.problem import problem

DENSE = "stage1.0.rbr_dense.conv.weight"
VARIANCE = "stage1.0.rbr_dense.bn.running_var"


def text() -> bytes:
    return b"These are not weights.\n" * 40


def truncated() -> bytes:
    whole = tiny.checkpoint()
    return whole[: len(whole) * 2 // 3]


def pickled_module() -> bytes:
    return tiny.saved(torch.nn.Linear(2, 2))


def wrong_shape() -> bytes:
    state = tiny.state()
    state[VARIANCE] = torch.ones(3)
    return tiny.saved(state)


def missing_key() -> bytes:
    state = tiny.state()
    del state["stage2.0.rbr_1x1.bn.weight"]
    return tiny.saved(state)


def extra_key() -> bytes:
    return tiny.saved({**tiny.state(), "stage1.0.rbr_other.weight": torch.zeros(3)})


def not_a_number() -> bytes:
    state = tiny.state()
    state[DENSE] = state[DENSE].clone()
    state[DENSE][0, 0, 0, 0] = float("nan")
    return tiny.saved(state)


def negative_variance() -> bytes:
    state = tiny.state()
    state[VARIANCE] = state[VARIANCE] - 1e3
    return tiny.saved(state)


def half_converted() -> bytes:
    state, deploy = tiny.state(), tiny.deploy_state()
    for key in [key for key in state if key.startswith("stage1.0.")]:
        del state[key]
    state |= {key: tensor for key, tensor in deploy.items() if key.startswith("stage1.0.")}
    return tiny.saved(state)


def stranger() -> bytes:
    return tiny.saved({"transformer.h.0.attn.weight": torch.zeros(4, 4)})


def no_tensors() -> bytes:
    return tiny.saved({"epoch": 3, "best": 0.9})


def not_a_torch_zip() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("letter.txt", "dear reader")
    return buffer.getvalue()


REFUSED: list[tuple[Callable[[], bytes], str, str]] = [
    (text, "not_a_checkpoint", ""),
    (lambda: b"", "empty_file", ""),
    (truncated, "truncated_file", ""),
    (pickled_module, "whole_module_pickle", "torch.nn.modules.linear.Linear"),
    (wrong_shape, "shape_mismatch", VARIANCE),
    (missing_key, "missing_keys", "stage2.0.rbr_1x1.bn.weight"),
    (extra_key, "unexpected_keys", "stage1.0.rbr_other.weight"),
    (not_a_number, "non_finite_weights", DENSE),
    (negative_variance, "negative_variance", VARIANCE),
    (half_converted, "mixed_form", "stage1.0.rbr_reparam"),
    (stranger, "unknown_architecture", "transformer"),
    (no_tensors, "no_state_dict", ""),
    (not_a_torch_zip, "not_a_checkpoint", ""),
]


@pytest.mark.parametrize(
    ("make", "code", "named"),
    REFUSED,
    ids=[f"{code}-{n}" for n, (_, code, _) in enumerate(REFUSED)],
)
def test_a_wrong_file_is_refused_by_name_and_kept(
    http: httpx.Client, make: Callable[[], bytes], code: str, named: str
) -> None:
    data = make()
    model = f"refused-{code}".replace("_", "-")
    url = f"/v1/models/{model}/versions"
    answer = http.post(
        url,
        files={"checkpoint": ("wrong.pth", data)},
        data={"config": json.dumps(tiny.CONFIG)},
        headers={"Prefer": "wait=100"},
    )
    body = problem(answer, 422, code)
    assert named in body["detail"]
    assert body["location"] == answer.headers["location"] == f"{url}/{body['version']}"

    version = http.get(body["location"]).json()
    assert version["state"] == "rejected"
    assert version["error"]["code"] == code
    assert version["error"]["detail"] == body["detail"]
    assert version["checkpoint"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert http.get(f"{body['location']}/checkpoints/train").content == data
    problem(http.get(f"{body['location']}/checkpoints/deploy"), 409, "version_not_ready")
    problem(http.get(f"{body['location']}/report"), 409, "version_not_ready")
    predict = http.post(
        f"/v1/models/{model}/predict",
        content=tiny.npy(tiny.rows(1)),
        headers={"Content-Type": tiny.NPY},
    )
    problem(predict, 409, "version_not_ready")


def test_a_deploy_form_is_accepted_as_it_is(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/models/deploy-form/versions",
        files={"checkpoint": ("deploy.pth", tiny.saved(tiny.deploy_state()))},
        data={"config": json.dumps(tiny.CONFIG)},
        headers={"Prefer": "wait=100"},
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["checkpoint"]["form"] == "deploy"
    predict = "/v1/models/deploy-form/predict"
    body, headers = tiny.npy(tiny.rows(2)), {"Content-Type": tiny.NPY}
    assert http.post(predict, content=body, headers=headers).status_code == 200
    train = http.post(predict, params={"form": "train"}, content=body, headers=headers)
    problem(train, 404, "form_not_available")
    problem(http.post("/v1/models/deploy-form/benchmark"), 404, "form_not_available")
