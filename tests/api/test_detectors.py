"""A detector: its known blocks convert for download, and a bundle of the whole of it is served."""

from __future__ import annotations

import io
import uuid
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

import service
from service.networks import RepVGGBlock, deploy_skeleton
from service.networks.detectors import RepConv
from tests.api.problem import problem


class Detector(nn.Module):
    """An invented network of two projects' blocks and a layer of its own; two feature maps out."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([RepVGGBlock(3, 6, stride=2), RepVGGBlock(6, 6)])
        self.neck = nn.ModuleDict({"up": RepConv(6, 6, identity=True)})
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.backbone:
            x = block(x)
        return self.head(x), self.neck["up"](x)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(0)
    network = Detector().train()
    for _ in range(3):  # so that no statistic is a fresh one
        network(torch.randn(8, 3, 12, 12))
    return network.eval()


def upload(http: httpx.Client, model: str, name: str, content: bytes) -> dict[str, Any]:
    answer = http.post(
        f"/v1/models/{model}/versions",
        files={"checkpoint": (name, content)},
        headers={"Prefer": "wait=100"},
    )
    assert answer.status_code == 201, answer.text
    version: dict[str, Any] = answer.json()
    return version


def flat(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([output.flatten(1) for output in outputs], 1)


def test_the_blocks_of_a_detector_convert_for_download_but_are_not_served(
    http: httpx.Client, detector: nn.Module
) -> None:
    model, file = f"detector-{uuid.uuid4().hex[:8]}", io.BytesIO()
    torch.save(detector.state_dict(), file)
    version = upload(http, model, "detector.pt", file.getvalue())
    assert version["state"] == "ready"
    assert (version["fusion"]["fused"], version["fusion"]["convolutions_after"]) == (3, 3)
    content = http.get(f"/v1/models/{model}/versions/1/checkpoints/deploy").content
    folded = deploy_skeleton(detector).eval()
    folded.load_state_dict(load_safetensors(content))
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), detector(x), rtol=1e-4, atol=1e-5)
    refused = http.post(f"/v1/models/{model}/predict", json={"inputs": x.tolist()})
    assert "foldserve pack" in problem(refused, 409, "not_servable")["remedy"]


def test_a_bundle_of_a_detector_is_served(
    http: httpx.Client, detector: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 12, 12)
    bundle = service.pack(detector, (x,), tmp_path / "detector.bundle")
    model = f"detector-{uuid.uuid4().hex[:8]}"
    version = upload(http, model, bundle.name, bundle.read_bytes())
    assert version["fusion"]["convolutions_after"] < version["fusion"]["convolutions_before"]
    sent = io.BytesIO()
    np.save(sent, x.numpy())
    answer = http.post(
        f"/v1/models/{model}/predict",
        content=sent.getvalue(),
        headers={"Content-Type": "application/x-npy", "Accept": "application/x-npy"},
    )
    assert answer.status_code == 200, answer.text
    with torch.no_grad():
        wanted = flat(detector(x)).numpy()
    np.testing.assert_allclose(np.load(io.BytesIO(answer.content)), wanted, rtol=1e-3, atol=1e-4)
