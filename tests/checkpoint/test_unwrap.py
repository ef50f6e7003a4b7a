"""Wrappers, prefixes, moving averages, and the checks on values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from service.checkpoint import ReadLimits, read_checkpoint
from service.checkpoint.unwrap import unwrap
from service.checkpoint.weights import check_weights
from service.errors import (
    LimitExceeded,
    NegativeVariance,
    NonFiniteWeights,
    NoStateDict,
    NotACheckpoint,
    UnsupportedContainer,
)

from . import forge

STATE = {"conv.weight": torch.ones(1), "bn.num_batches_tracked": torch.tensor(3)}
EMA = {"conv.weight": torch.zeros(1), "bn.num_batches_tracked": torch.tensor(3)}


def prefixed(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def take(
    content: Any, weights: Literal["model", "ema"] = "model"
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    return unwrap(content, weights, ReadLimits())


@pytest.mark.parametrize(
    ("content", "wrappers"),
    [
        (STATE, ()),
        ({"state_dict": STATE, "epoch": 3}, ("state_dict",)),
        ({"model": STATE, "optimizer": {"state": {0: {"m": torch.ones(1)}}}}, ("model",)),
        ({"model": {"state_dict": STATE}}, ("model", "state_dict")),
        ({"net": STATE}, ("net",)),
        (prefixed("module."), ("module.",)),
        (prefixed("_orig_mod."), ("_orig_mod.",)),
        (prefixed("module._orig_mod."), ("module.", "_orig_mod.")),
        ({"state_dict": prefixed("module.")}, ("state_dict", "module.")),
        ({"state_dict": STATE, "best": torch.tensor(1.0)}, ("state_dict",)),
        ({"state_dict": STATE, "state_dict_ema": EMA}, ("state_dict",)),
        ({"ema": STATE}, ("ema",)),
        ({**STATE, "epoch": 3, "name": "x"}, ()),
    ],
)
def test_the_usual_wrappers_come_off(content: object, wrappers: tuple[str, ...]) -> None:
    state, taken = take(content)
    assert taken == wrappers
    assert forge.same(state, STATE)


@pytest.mark.parametrize(
    ("content", "wrappers"),
    [
        ({"state_dict": STATE, "state_dict_ema": EMA}, ("state_dict_ema",)),
        ({"model": STATE, "model_ema": EMA}, ("model_ema",)),
        (
            {"model": STATE, "ema": {"state_dict": prefixed("module.", EMA)}},
            ("ema", "state_dict", "module."),
        ),
        ({"model": {"state_dict": STATE, "ema": EMA}}, ("model", "ema")),
    ],
)
def test_the_moving_average_is_an_explicit_choice(
    content: object, wrappers: tuple[str, ...]
) -> None:
    state, taken = take(content, "ema")
    assert taken == wrappers
    assert forge.same(state, EMA)


def test_a_missing_moving_average_is_said() -> None:
    with pytest.raises(NoStateDict, match="no moving average; its keys are 'state_dict', 'epoch'"):
        take({"state_dict": STATE, "epoch": 3}, "ema")


def test_a_prefix_comes_off_only_when_every_key_has_it() -> None:
    mixed = {**prefixed("module."), "head.weight": torch.ones(1)}
    state, taken = take(mixed)
    assert taken == ()
    assert forge.same(state, mixed)


def test_the_choice_reaches_the_file(tmp_path: Path) -> None:
    path = forge.saved(tmp_path / "net", {"state_dict": STATE, "state_dict_ema": EMA})
    assert forge.same(read_checkpoint(path).state, STATE)
    assert forge.same(read_checkpoint(path, weights="ema").state, EMA)


def optimizer_state() -> dict[str, Any]:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (optimizer_state(), "optimizer's state but no weights; its keys are 'state', 'param_group"),
        ({"optimizer": optimizer_state(), "epoch": 1}, "optimizer's state.*'optimizer', 'epoch'"),
        ({"epoch": 1, "lr": 0.1}, "no tensors by name; its keys are 'epoch', 'lr'"),
        ({}, "empty mapping"),
        ([torch.ones(1)], "a list"),
        (torch.ones(1), "a single tensor"),
        (3, "a int"),
        ({0: torch.ones(1)}, "no tensors by name"),
        ({"state_dict": {}}, "no tensors by name"),
        ({f"k{i}": i for i in range(30)}, "and 18 more"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_has(content: object, says: str) -> None:
    with pytest.raises(NoStateDict, match=says):
        take(content)


def test_non_finite_weights_are_named() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2):
        for bad in (float("nan"), float("inf")):
            broken = torch.zeros(3)
            broken[1] = bad
            state = {**STATE, "layer.weight": broken.to(dtype)}
            with pytest.raises(NonFiniteWeights, match=r"1 of 3 .*layer\.weight") as raised:
                check_weights(state)
            assert raised.value.extra["keys"] == ["layer.weight"]
    check_weights(STATE)


def test_the_last_element_of_a_large_tensor_is_looked_at() -> None:
    large = torch.zeros((1 << 22) + 5)
    check_weights({"w": large})
    large[-1] = float("nan")
    with pytest.raises(NonFiniteWeights):
        check_weights({"w": large})


def test_negative_variances_are_named() -> None:
    ok = {"bn.running_var": torch.tensor([0.0, 1.0]), "bn.running_mean": torch.tensor([-1.0])}
    check_weights(ok)
    with pytest.raises(NegativeVariance, match=r"bn\.running_var") as raised:
        check_weights({**ok, "bn.running_var": torch.tensor([1.0, -1e-9])})
    assert raised.value.extra["keys"] == ["bn.running_var"]


def test_sparse_weights_are_refused() -> None:
    with pytest.raises(UnsupportedContainer, match="sparse"):
        check_weights({"w": torch.eye(3).to_sparse()})


@pytest.mark.parametrize("key", ["a\ud800b", "a\0b", "a\u202eb", "a\nb"])
def test_keys_that_cannot_be_shown_are_refused(key: str) -> None:
    with pytest.raises(NotACheckpoint, match="cannot be shown") as raised:
        take({key: torch.ones(1)})
    json.dumps(raised.value.to_dict(), ensure_ascii=False).encode()
    with pytest.raises(NoStateDict) as none:
        take({key: 1})
    json.dumps(none.value.to_dict(), ensure_ascii=False).encode()


def test_long_keys_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="key_characters"):
        take({"k" * 513: torch.ones(1)})
