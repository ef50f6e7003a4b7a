"""What the load tests serve: a network that takes milliseconds a row, and one that can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor, nn

import service
from service.networks import RepVGG
from tests.api import tiny
from tests.running import RunningServer

SIDE = 64
BUSY_CONFIG: dict[str, Any] = {"input_shape": [3, SIDE, SIDE], "backend": "torch"}


def busy_checkpoint() -> bytes:
    """About 100 million multiply-accumulates a row in a file of two megabytes."""
    return _repvgg(10, 64)


def heavy_checkpoint() -> bytes:
    """Ten times as many: what four times its capacity asks for costs the client little."""
    return _repvgg(16, 160)


def _repvgg(depth: int, width: int) -> bytes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = RepVGG(
            num_blocks=[depth, 1, 1, 1], widths=[width] * 4, stem_width=64, num_classes=10
        )
        made.train()
        with torch.no_grad():
            for _ in range(3):
                made(torch.randn(8, 3, SIDE, SIDE))
    return tiny.saved({"state_dict": made.eval().state_dict()})


def busy_body() -> bytes:
    """One row for it, as npy in float16."""
    row = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    return tiny.npy(row.half().numpy())


class Lookup(nn.Module):
    """Looks up rows of a table of 16: any other number makes the whole batch fail."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, index: Tensor) -> Tensor:
        out: Tensor = self.head(self.table(index).mean(1))
        return out


def lookup() -> Lookup:
    torch.manual_seed(11)
    return Lookup().eval()


def lookup_bundle(folder: Path) -> bytes:
    """It, packed: indices [N, 4] in, [N, 4] out."""
    example = torch.randint(0, 16, (2, 4))
    return service.pack(lookup(), (example,), folder / "lookup.bundle").read_bytes()


def lookup_body(index: int) -> bytes:
    """A request for one row of the same index, four times."""
    return json.dumps({"inputs": {"input_0": [[index] * 4]}}).encode()


def upload(server: RunningServer, model: str, data: bytes, config: dict[str, Any]) -> None:
    """Put a model on the service, ready."""
    answer = httpx.post(
        f"{server.url}/v1/models/{model}/versions",
        files={"checkpoint": ("x", data)},
        data={"config": json.dumps(config)},
        headers={"Prefer": "wait=300"},
        timeout=400,
    )
    assert answer.status_code == 201, answer.text


def post(path: str, body: bytes, kind: str, accept: str = "*/*") -> bytes:
    """A whole request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nAccept: {accept}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
