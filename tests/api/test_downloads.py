from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
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
    problem(deploy(http, model, "zip"), 422, "invalid_request")
    missing = http.get(f"/v1/models/{model}/versions/9/checkpoints/deploy")
    problem(missing, 404, "version_not_found")


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_exports_run_in_their_own_engine(
    http: httpx.Client, model: str, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    answer = deploy(http, model, form)
    assert answer.status_code == 200, answer.text
    ending = {"onnx": "onnx", "openvino": "openvino.zip"}[form]
    assert answer.headers["content-disposition"].endswith(f'{model}-1-deploy.{ending}"')
    again = deploy(http, model, form)  # kept: the very same file
    assert again.headers["etag"] == answer.headers["etag"]
    folder = tmp_path_factory.mktemp("export")
    run = in_onnx if form == "onnx" else in_openvino
    for count in (1, 5):
        rows = tiny.rows(count)
        truth = tiny.expected(rows)
        found = run(answer.content, folder, rows)
        assert found.shape == truth.shape
        assert np.abs(found - truth).max() < 1e-4 * np.abs(truth).max()


def in_onnx(content: bytes, folder: Path, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    import onnxruntime  # slow to import, and used by no other test here

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(["output_0"], {"input_0": rows})
    return np.asarray(found)


def in_openvino(content: bytes, folder: Path, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    import openvino

    zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
    compiled = openvino.Core().compile_model(
        str(folder / "deploy.xml"), "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32}
    )
    return np.array(compiled({"input_0": rows})["output_0"])


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
