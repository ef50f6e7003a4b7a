from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors

from service.graph import ProgramModule, load_program
from service.networks import deploy_skeleton
from tests.api import tiny
from tests.api.problem import problem


def deploy(http: httpx.Client, model: str, form: str) -> httpx.Response:
    return http.get(f"/v1/models/{model}/versions/1/checkpoints/deploy", params={"format": form})


def test_the_uploaded_bytes_come_back_unchanged(http: httpx.Client, model: str) -> None:
    answer = http.get(f"/v1/models/{model}/versions/1/checkpoints/train")
    assert answer.content == tiny.checkpoint()
    assert "tiny.pth" in answer.headers["content-disposition"]
    version = http.get(f"/v1/models/{model}/versions/1").json()
    assert answer.headers["etag"] == f'"{version["checkpoint"]["sha256"]}"'
    part = http.get(answer.request.url, headers={"Range": "bytes=10-19"})
    assert part.status_code == 206
    assert part.content == answer.content[10:20]


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_the_deploy_state_dict_loads_into_the_official_form(
    http: httpx.Client, model: str, form: str
) -> None:
    answer = deploy(http, model, form)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-disposition"].endswith(f'{model}-1-deploy.{form}"')
    state = (
        load_safetensors(answer.content)
        if form == "safetensors"
        else torch.load(io.BytesIO(answer.content), weights_only=True)
    )
    assert "stage1.0.rbr_reparam.weight" in state
    network = deploy_skeleton(tiny.network())
    network.load_state_dict(state)
    rows = tiny.rows(3)
    with torch.no_grad():
        outputs = network.eval().double()(torch.from_numpy(rows).double()).numpy()
    truth = tiny.expected(rows)
    assert np.abs(outputs - truth).max() < 1e-5 * np.abs(truth).max()


def test_the_bundle_is_the_served_program(
    http: httpx.Client, model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("bundle") / "deploy.bundle"
    path.write_bytes(deploy(http, model, "bundle").content)
    rows = tiny.rows(3)
    with torch.no_grad():
        outputs = ProgramModule(load_program(path))(torch.from_numpy(rows)).numpy()
    truth = tiny.expected(rows)
    assert np.abs(outputs - truth).max() < 1e-4 * np.abs(truth).max()


def test_formats_that_are_not_there(http: httpx.Client, model: str) -> None:
    onnx = problem(deploy(http, model, "onnx"), 404, "form_not_available")
    assert onnx["available"] == ["safetensors", "pth", "bundle"]
    problem(deploy(http, model, "zip"), 422, "invalid_request")
    missing = http.get(f"/v1/models/{model}/versions/9/checkpoints/deploy")
    problem(missing, 404, "version_not_found")


def test_the_report_names_every_block(http: httpx.Client, model: str) -> None:
    answer = http.get(f"/v1/models/{model}/versions/1/report")
    assert answer.headers["content-type"] == "application/json"
    report = answer.json()
    assert report["certificate"]["passed"] is True
    blocks = {block["module"]: block for block in report["blocks"]}
    assert set(blocks) == {"stage0", "stage1.0", "stage2.0", "stage3.0", "stage4.0"}
    for block in blocks.values():
        assert block["status"] == "fused"
        assert block["rules"]
        assert block["error_float64"] < 1e-12
