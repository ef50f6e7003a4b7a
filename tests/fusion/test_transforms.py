"""Each transformation against running what it replaces, with a control that must fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.fusion import transforms


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X = normal(2, 8, 9, 7) + 0.3


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_batch_norm_folds(groups: int) -> None:
    kernel, bias = normal(8, 8 // groups, 3, 3), normal(8)
    mean, variance = normal(8, seed=1), normal(8, seed=2).square() + 0.1
    gamma, beta = normal(8, seed=3), normal(8, seed=4)
    y = F.conv2d(X, kernel, bias, padding=1, groups=groups)
    want = F.batch_norm(y, mean, variance, gamma, beta, eps=1e-3)

    def got(eps: float) -> Tensor:
        k, b = transforms.fold_batch_norm(kernel, mean, variance, gamma, beta, eps, bias)
        return F.conv2d(X, k, b, padding=1, groups=groups)

    assert same(got(1e-3), want)
    assert not same(got(1e-5), want)


def test_branches_add() -> None:
    layers = [(normal(4, 8, 3, 3, seed=i), normal(4, seed=i)) for i in range(3)]
    want = sum(F.conv2d(X, k, b, padding=1) for k, b in layers)
    assert isinstance(want, Tensor)
    assert same(F.conv2d(X, *transforms.add_branches(layers), padding=1), want)
    assert not same(F.conv2d(X, *transforms.add_branches(layers[1:]), padding=1), want)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_sequence_merges(groups: int) -> None:
    first = normal(12, 8 // groups, 1, 1), normal(12)
    second = normal(4, 12 // groups, 3, 3), normal(4)
    inner = F.conv2d(X, *first, groups=groups)
    kernel, bias = transforms.merge_sequence(first, second, groups)
    assert same(F.conv2d(X, kernel, bias, groups=groups), F.conv2d(inner, *second, groups=groups))
    padded = F.conv2d(inner, *second, padding=1, groups=groups)
    assert not same(F.conv2d(X, kernel, bias, padding=1, groups=groups), padded)


def test_depth_concatenates() -> None:
    layers = [(normal(n, 8, 3, 3), normal(n)) for n in (3, 5)]
    want = torch.cat([F.conv2d(X, *layer, stride=2) for layer in layers], dim=1)
    assert same(F.conv2d(X, *transforms.concatenate_depth(layers), stride=2), want)
    assert not same(F.conv2d(X, *transforms.concatenate_depth(layers[::-1]), stride=2), want)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_average_pooling_is_a_convolution(groups: int) -> None:
    want = F.avg_pool2d(X, 3, stride=2, padding=1)
    kernel = transforms.average_pooling(8, 3, groups)
    assert same(F.conv2d(X, kernel, stride=2, padding=1, groups=groups), want)
    uncounted = F.avg_pool2d(X, 3, stride=2, padding=1, count_include_pad=False)
    assert not same(F.conv2d(X, kernel, stride=2, padding=1, groups=groups), uncounted)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_small_kernels_embed(shape: tuple[int, int]) -> None:
    kernel = normal(4, 8, *shape)
    want = F.conv2d(X, kernel, padding=(shape[0] // 2, shape[1] // 2))
    wide = transforms.embed_kernel(kernel, 5)
    assert same(F.conv2d(X, wide, padding=2), want)
    assert not same(F.conv2d(X, wide.roll(1, dims=-1), padding=2), want)


def test_a_kernel_without_a_centre_is_refused() -> None:
    with pytest.raises(ValueError, match="no centre"):
        transforms.embed_kernel(normal(4, 8, 2, 2), 3)
