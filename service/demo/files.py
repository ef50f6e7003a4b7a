"""The files that the demo uploads: checkpoints as training scripts save them, and a photograph."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from service.networks import RepVGG
from service.networks.repvgg import REPVGG

A0_SIDE = 224


def save_checkpoint(network: nn.Module, path: Path, prefix: str = "") -> None:
    """Write `{"state_dict": ..., "epoch": ...}`; `prefix` is what DataParallel puts before keys."""
    state = {prefix + key: tensor for key, tensor in network.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 20}, path)


def full_size_repvgg() -> nn.Module:
    """RepVGG-A0 for 1000 classes: seeded weights, and batch norms that differ channel by channel.

    Nothing is downloaded, so its labels mean nothing, but its shape and its cost are those of the
    published network. Scales and shifts are drawn, then each norm measures its statistics on
    textured pictures, as training would: with fresh statistics (0 and 1) a wrong fold hardly shows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RepVGG(**REPVGG["RepVGG-A0"])
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
                module.momentum = None
        nn.init.normal_(network.linear.weight, 0.0, 0.1)
        network.train()
        with torch.no_grad():
            for _ in range(2):
                network(_textures(8))
    return network.eval()


def photograph() -> bytes:
    """A JPEG of 320x240 pixels: a sun over hills, drawn from formulas."""
    y, x = np.mgrid[0:240, 0:320] / 240.0
    sky = np.stack([0.35 + 0.3 * y, 0.55 + 0.2 * y, 0.9 - 0.1 * y], axis=-1)
    sun = ((x - 0.95) ** 2 + (y - 0.3) ** 2 < 0.014)[..., None]
    picture = np.where(sun, np.array([1.0, 0.9, 0.4]), sky)
    for height, swing, colour in ((0.6, 0.10, (0.2, 0.45, 0.3)), (0.75, 0.07, (0.12, 0.3, 0.15))):
        hill = (y > height + swing * np.sin(x * 6 / (height + swing)))[..., None]
        shade = np.array(colour) * (1 + 0.15 * np.sin(60 * x + 40 * y))[..., None]
        picture = np.where(hill, shade, picture)
    out = io.BytesIO()
    Image.fromarray((255 * picture.clip(0, 1)).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def _textures(count: int) -> Tensor:
    """(count, 3, 224, 224): sums of random waves with noise, normalised like photographs."""
    line = torch.linspace(0, 2 * math.pi, A0_SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    waves = torch.randint(1, 12, (count, 3, 4, 2)).float()
    phase = 2 * math.pi * torch.rand(count, 3, 4)
    angle = waves[..., 0, None, None] * y + waves[..., 1, None, None] * x + phase[..., None, None]
    return angle.sin().sum(2) + 0.3 * torch.randn(count, 3, A0_SIDE, A0_SIDE)
