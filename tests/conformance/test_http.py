"""Every RepVGG and DBB case through real HTTP: upload, certificate, prediction, deploy tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from tests.conformance import official
from tests.networks import cases

pytestmark = cases.needs_cases

NAMES = cases.names("repvgg_", "repvggplus_", "dbb_", "blk_repvgg", "blk_dbb")
NPY = {"Content-Type": "application/x-npy", "Accept": "application/x-npy"}
SAME_OUTPUT = 1e-3
SAME_TENSOR = 1e-5


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def upload(http: httpx.Client, model: str, name: str, state: dict[str, Tensor]) -> dict[str, Any]:
    """The version's resource once its conversion has ended."""
    answer = http.post(
        f"/v1/models/{model}/versions",
        files={"checkpoint": (f"{name}.pth", official.checkpoint(state))},
        data={"config": official.compact(official.config(name))},
        headers={"Prefer": "wait=240"},
    )
    assert answer.status_code == 201, answer.text
    version: dict[str, Any] = answer.json()
    return version


def predict(http: httpx.Client, model: str, name: str, form: str = "deploy") -> Any:
    answer = http.post(
        f"/v1/models/{model}/predict",
        params={"form": form},
        content=official.npy(cases.input_of(name).numpy()),
        headers=NPY,
    )
    assert answer.status_code == 200, answer.text
    return official.from_npy(answer.content)


def deploy_tensors(http: httpx.Client, model: str, version: int) -> dict[str, Tensor]:
    answer = http.get(
        f"/v1/models/{model}/versions/{version}/checkpoints/deploy",
        params={"format": "safetensors"},
    )
    assert answer.status_code == 200, answer.text
    return dict(load_safetensors(answer.content))


def model_of(name: str) -> str:
    return f"case-{name}".replace("_", "-")


@pytest.mark.parametrize("name", NAMES)
def test_a_case_converts_serves_and_downloads_as_the_official_code(
    http: httpx.Client, name: str
) -> None:
    model = model_of(name)
    version = upload(http, model, name, cases.state_of(name))

    assert version["state"] == "ready"
    assert version["checkpoint"]["form"] == "train"
    fusion = version["fusion"]
    before, after = official.convolutions(name)
    gates = official.gates(name)
    assert (fusion["fused"], fusion["kept"], fusion["refused"]) == (after - gates, gates, 0)
    assert fusion["blocks"] == after
    assert (fusion["convolutions_before"], fusion["convolutions_after"]) == (before, after)
    assert fusion["macs_after"] < fusion["macs_before"]
    assert 0 < fusion["error_float64"] <= 1e-12
    assert 0 < fusion["error_end_to_end"] <= 1e-3

    assert official.output_error(name, predict(http, model, name)) < SAME_OUTPUT
    assert official.output_error(name, predict(http, model, name, "train")) < SAME_OUTPUT
    found = deploy_tensors(http, model, version["version"])
    assert official.deploy_error(name, found) < SAME_TENSOR
    http.delete(f"/v1/models/{model}").raise_for_status()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("repvgg_tiny", "stage1.1.rbr_1x1.conv.weight"),
        ("repvgg_tiny", "stage1.1.rbr_identity.running_var"),
        ("blk_dbb_k3", "dbb_1x1_kxk.bn1.bn.bias"),
    ],
)
def test_a_case_with_one_wrong_tensor_fails_both_comparisons(
    http: httpx.Client, name: str, key: str
) -> None:
    state = cases.state_of(name)
    state[key] = state[key].roll(1, 0)
    model = f"wrong-{model_of(name)}"
    version = upload(http, model, name, state)
    assert official.output_error(name, predict(http, model, name)) > SAME_OUTPUT
    found = deploy_tensors(http, model, version["version"])
    assert official.deploy_error(name, found) > SAME_TENSOR
    http.delete(f"/v1/models/{model}").raise_for_status()


def test_a_mean_too_small_to_move_the_output_fails_the_tensors(http: httpx.Client) -> None:
    name, key = "repvgg_tiny", "stage0.rbr_dense.bn.running_mean"
    state = cases.state_of(name)
    state[key] = state[key] + 1e-3
    model = "nudged-tiny"
    version = upload(http, model, name, state)
    assert official.output_error(name, predict(http, model, name)) < SAME_OUTPUT
    found = deploy_tensors(http, model, version["version"])
    assert official.deploy_error(name, found) > SAME_TENSOR
    http.delete(f"/v1/models/{model}").raise_for_status()


def test_the_output_comparison_sees_swapped_images_and_wrong_shapes() -> None:
    name = "repvgg_tiny"
    _, network = cases.built(name)
    right = cases.outputs(network, cases.input_of(name).double()).float().numpy()
    assert official.output_error(name, right) < 1e-6
    assert official.output_error(name, right[::-1].copy()) > SAME_OUTPUT
    assert official.output_error(name, right[:, :-1]) == float("inf")
    assert official.output_error(name, np.full_like(right, np.nan)) == float("inf")


def test_the_tensor_comparison_sees_transposed_kernels_and_other_keys() -> None:
    name = "blk_dbb_k3"
    zeros = {key: torch.zeros(shape) for key, shape in cases.deploy_shapes(name).items()}
    assert official.deploy_error(name, zeros) == pytest.approx(1)
    renamed = {key.replace("dbb_reparam", "conv"): t for key, t in zeros.items()}
    assert official.deploy_error(name, renamed) == float("inf")
