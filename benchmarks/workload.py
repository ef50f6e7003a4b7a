"""What the server benchmark asks: two networks, the rows they get, the bodies that carry them.

`tiny` computes almost nothing, so that what is measured is everything around the model;
`RepVGG-A0` at 224x224 is the network that the published comparisons of fused networks begin with.
Both have seeded weights. Every peer runs the deploy form with its official key names as an ordinary
PyTorch module; the service under test is given the training form, as its users have it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.networks import RepVGG, deploy_skeleton
from service.networks.repvgg import REPVGG

Body = Literal["binary", "jpeg", "json"]
Floats = NDArray[np.float32]

BODIES: tuple[Body, ...] = ("binary", "jpeg", "json")
SAMPLES = 4
PHOTO = (500, 375)
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)


@dataclass(frozen=True)
class Network:
    """A network by name, its square input's side in pixels, and how its training form is made."""

    name: str
    side: int
    arguments: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """One row: channels, height, width."""
        return 3, self.side, self.side

    def training_form(self, seed: int = 0) -> nn.Module:
        """The network with seeded weights and batch norms that have seen different data."""
        torch.manual_seed(seed)
        module = RepVGG(**self.arguments)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias, std=0.2)
                norm.running_mean = torch.randn(norm.num_features) * 0.2
                norm.running_var = torch.rand(norm.num_features) + 0.5
        return module.eval()


NETWORKS: Mapping[str, Network] = {
    "tiny": Network(
        "tiny",
        32,
        {"num_blocks": [1, 1, 1, 1], "widths": [8, 8, 12, 16], "stem_width": 8, "num_classes": 10},
    ),
    "RepVGG-A0": Network("RepVGG-A0", 224, REPVGG["RepVGG-A0"]),
}


@dataclass(frozen=True)
class Sample:
    """One input in every encoding: raw float32, npy, JPEG and nested lists."""

    row: Floats
    photo: bytes

    @property
    def raw(self) -> bytes:
        return self.row.tobytes()

    @property
    def npy(self) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, self.row[None])
        return buffer.getvalue()

    @property
    def nested(self) -> list[Any]:
        rows: list[Any] = self.row[None].round(6).tolist()
        return rows

    @property
    def base64(self) -> str:
        return base64.b64encode(self.raw).decode()

    @property
    def photo64(self) -> str:
        return base64.b64encode(self.photo).decode()


def samples(network: Network, count: int = SAMPLES) -> list[Sample]:
    """Seeded rows, and photographs of a usual size made of smooth noise."""
    random = np.random.default_rng(0)
    return [
        Sample(random.normal(size=network.shape).astype(np.float32), _photo(random))
        for _ in range(count)
    ]


def _photo(random: np.random.Generator) -> bytes:
    from PIL import Image

    coarse = random.integers(0, 256, (PHOTO[1] // 12, PHOTO[0] // 12, 3), dtype=np.uint8)
    fine = random.integers(-12, 13, (PHOTO[1], PHOTO[0], 3))
    smooth = np.asarray(Image.fromarray(coarse).resize(PHOTO, Image.Resampling.BICUBIC))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + fine, 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


class Deployed:
    """The deploy form as every peer serves it: a plain PyTorch module in inference mode."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds `network` (the name) and `deploy.pth` (the official deploy state dict)."""
        self.network = NETWORKS[(folder / "network").read_text().strip()]
        self.module = deploy_skeleton(self.network.training_form()).eval()
        state = torch.load(folder / "deploy.pth", weights_only=True)
        self.module.load_state_dict(state, strict=True)
        self._row_bytes = 4 * int(np.prod(self.network.shape))
        for _ in range(3):
            self(np.zeros((1, *self.network.shape), np.float32))

    def __call__(self, rows: Floats) -> Floats:
        """Logits [N, classes] of rows [N, 3, side, side]."""
        with torch.inference_mode():
            logits: Floats = self.module(torch.from_numpy(rows)).numpy()
        return logits

    def row(self, body: bytes) -> Floats:
        """One row [3, side, side] from raw float32, a JPEG file or `{"inputs": [row]}`."""
        if len(body) == self._row_bytes:
            # Copied: a body is read-only memory, of which torch warns.
            return np.frombuffer(body, np.float32).reshape(self.network.shape).copy()
        if body[:2] == b"\xff\xd8":
            return preprocess(body, self.network.side)
        import orjson

        rows = np.asarray(orjson.loads(body)["inputs"], np.float32)
        return rows.reshape(self.network.shape)


def preprocess(photo: bytes, side: int) -> Floats:
    """Scale the shorter side, crop the middle, normalise: as evaluation scripts do with Pillow."""
    from PIL import Image

    image = Image.open(io.BytesIO(photo)).convert("RGB")
    shorter = side if side < 64 else round(side / 0.875)
    scale = shorter / min(image.size)
    size = (int(image.width * scale), int(image.height * scale))
    scaled = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    pixels = np.asarray(scaled.crop((left, top, left + side, top + side)), np.float32)
    return np.ascontiguousarray(((pixels / 255 - _MEAN) / _STD).transpose(2, 0, 1))


def http_request(path: str, body: bytes, **headers: str) -> bytes:
    """A whole HTTP/1.1 request; underscores in the names of headers stand for dashes."""
    lines = [f"POST {path} HTTP/1.1", "host: benchmark", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def json_request(path: str, value: Any) -> bytes:
    """A request with a JSON body."""
    return http_request(path, json.dumps(value).encode(), content_type="application/json")
