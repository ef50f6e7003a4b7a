"""Two small networks trained for real on scikit-learn's handwritten digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.networks import RepVGG, ResNet

SIDE = 8
CLASSES = 10
BATCH = 64


@dataclass(frozen=True)
class Digits:
    """The data set in two parts: images (N, 1, 8, 8) float32 in 0..1, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1797 images, a quarter of each class held out by a fixed seed."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, test_images = (
        torch.tensor(part, dtype=torch.float32).reshape(-1, 1, SIDE, SIDE) for part in parts[:2]
    )
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


@dataclass(frozen=True)
class Recipe:
    """A network to train and what its uploader has to say beside the checkpoint.

    `config` holds only what keys and shapes cannot tell: strides and the input's size.
    """

    model: str
    title: str
    make: Callable[[], nn.Module]
    config: dict[str, Any]
    prefix: str = ""
    epochs: int = 20


def repvgg() -> nn.Module:
    """A RepVGG of five blocks for 8x8 images, 79 thousand parameters."""
    return RepVGG(
        num_blocks=[2, 2],
        widths=[32, 64],
        stem_width=16,
        stem_stride=1,
        strides=[1, 2],
        in_channels=1,
        num_classes=CLASSES,
    )


def dbb_resnet() -> nn.Module:
    """A ResNet of two basic blocks whose 3x3 convolutions are Diverse Branch Blocks."""
    return ResNet(
        unit="dbb",
        block="basic",
        num_blocks=[1, 1],
        planes=[16, 32],
        stem_width=16,
        stem_kernel=3,
        stem_stride=1,
        stem_pool=False,
        in_channels=1,
        num_classes=CLASSES,
    )


RECIPES = (
    Recipe(
        model="digits-repvgg",
        title="RepVGG",
        make=repvgg,
        config={
            "architecture": {"name": "RepVGG", "stem_stride": 1, "strides": [1, 2]},
            "input_shape": [1, SIDE, SIDE],
        },
    ),
    Recipe(
        model="digits-dbb",
        title="Diverse Branch Block",
        make=dbb_resnet,
        config={"input_shape": [1, SIDE, SIDE]},
        prefix="module.",
    ),
)


def train(recipe: Recipe, data: Digits, step: Callable[[], None] = lambda: None) -> nn.Module:
    """A trained network in evaluation mode; the same weights every time on the same machine.

    SGD with Nesterov momentum under a one-cycle learning rate, images shifted by up to one pixel.
    `step` is called after each of `steps(recipe, data)` updates.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        network = recipe.make().train()
        peak = 0.1
        optimizer = torch.optim.SGD(
            network.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, peak, total_steps=steps(recipe, data)
        )
        for rows in _batches(recipe.epochs, len(data.train_labels)):
            images = _shift(data.train_images[rows])
            loss = F.cross_entropy(network(images), data.train_labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            step()
    return network.eval()


def steps(recipe: Recipe, data: Digits) -> int:
    """How many updates a training takes."""
    return recipe.epochs * math.ceil(len(data.train_labels) / BATCH)


def accuracy(network: nn.Module, data: Digits) -> float:
    """The share of held-out images that the network names rightly."""
    with torch.inference_mode():
        named = network(data.test_images).argmax(1)
    return float((named == data.test_labels).float().mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from more threads, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _batches(epochs: int, count: int) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count), BATCH)


def _shift(images: Tensor) -> Tensor:
    down, right = torch.randint(0, 3, (2,)).tolist()
    padded = F.pad(images, (1, 1, 1, 1))
    return padded[:, :, down : down + SIDE, right : right + SIDE]
