"""A network small enough to convert in a moment, and the files people could make of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.networks import RepVGG, deploy_skeleton

SIDE = 16
CLASSES = 5
SHAPE = (3, SIDE, SIDE)
CONFIG: dict[str, Any] = {
    "input_shape": list(SHAPE),
    "labels": ["ant", "bee", "cat", "dog", "eel"],
}
JSON = "application/json"
NPY = "application/x-npy"


def network(seed: int = 0) -> nn.Module:
    """A RepVGG of five blocks whose batch norms have seen something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = RepVGG(
            num_blocks=[1, 1, 1, 1], widths=[8, 8, 12, 16], stem_width=8, num_classes=CLASSES
        )
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
                module.momentum = None
        made.train()
        with torch.no_grad():
            made(torch.randn(16, *SHAPE))
    return made.eval()


def state(seed: int = 0) -> dict[str, Tensor]:
    """Its training-form state dict."""
    return dict(network(seed).state_dict())


def deploy_state() -> dict[str, Tensor]:
    """A state dict of its deploy form, with weights of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return dict(deploy_skeleton(network()).state_dict())


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def checkpoint(seed: int = 0) -> bytes:
    """The checkpoint as people save it."""
    return saved({"state_dict": state(seed)})


def expected(rows: NDArray[np.float32], seed: int = 0) -> NDArray[np.float64]:
    """The training form's outputs in float64."""
    with torch.no_grad():
        outputs: Tensor = network(seed).double()(torch.from_numpy(rows).double())
    return outputs.numpy()


def rows(count: int, seed: int = 7) -> NDArray[np.float32]:
    """Normally distributed inputs."""
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


def npy(array: NDArray[Any]) -> bytes:
    """What numpy.save writes."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def from_npy(body: bytes) -> NDArray[Any]:
    """What numpy.load reads."""
    array: NDArray[Any] = np.load(io.BytesIO(body), allow_pickle=False)
    return array


def changed(base: Mapping[str, Tensor], **tensors: Tensor) -> dict[str, Tensor]:
    """A copy of a state dict with some tensors replaced (`__` in names stands for a dot)."""
    return dict(base) | {key.replace("__", "."): tensor for key, tensor in tensors.items()}
