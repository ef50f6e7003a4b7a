"""What is refused, why, and what the refusal names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from service.errors import (
    InvalidConfig,
    MissingKeys,
    MixedForm,
    RecognitionError,
    ShapeMismatch,
    UnexpectedKeys,
    UnknownArchitecture,
)
from service.networks import ModelConfig, RepVGG, ResNet, build, deploy_skeleton, recognise

VALUES: dict[str, Any] = {"num_blocks": [2, 1], "widths": [8, 16], "num_classes": 5}
KEY = "stage1.1.rbr_dense.conv.weight"


@pytest.fixture
def module() -> RepVGG:
    torch.manual_seed(0)
    return RepVGG(**VALUES).eval()


@pytest.fixture
def state(module: RepVGG) -> dict[str, Tensor]:
    return dict(module.state_dict())


def refusal(state: dict[str, Tensor], **config: Any) -> RecognitionError:
    with pytest.raises(RecognitionError) as caught:
        recognise(state, ModelConfig(**config))
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("key", [KEY, "linear.weight", "stage0.rbr_1x1.bn.running_var"])
def test_a_missing_key_is_named(state: dict[str, Tensor], key: str) -> None:
    del state[key]
    error = refusal(state)
    assert isinstance(error, MissingKeys)
    assert key in error.detail
    assert error.extra["keys"] == [key]


def test_a_missing_block_is_named(state: dict[str, Tensor]) -> None:
    holed = {key: t for key, t in state.items() if not key.startswith("stage1.0.")}
    error = refusal(holed)
    assert isinstance(error, MissingKeys)
    assert "stage1.0" in error.detail


def test_an_unexpected_key_is_named(state: dict[str, Tensor]) -> None:
    state["stage1.0.rbr_extra.weight"] = torch.zeros(3)
    error = refusal(state)
    assert isinstance(error, UnexpectedKeys)
    assert error.extra["keys"] == ["stage1.0.rbr_extra.weight"]


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (KEY, (8, 8, 5, 5)),
        (KEY, (7, 8, 3, 3)),
        (KEY, (8,)),
        ("stage1.1.rbr_dense.bn.weight", (9,)),
        ("stage2.0.rbr_1x1.conv.weight", (16, 8)),
        ("stage0.rbr_dense.conv.weight", (8, 0, 3, 3)),
        ("linear.weight", (5, 17)),
    ],
)
def test_the_one_wrong_shape_is_named(
    state: dict[str, Tensor], key: str, shape: tuple[int, ...]
) -> None:
    state[key] = torch.zeros(shape)
    error = refusal(state)
    assert isinstance(error, ShapeMismatch)
    assert error.extra["keys"] == [key]


def test_half_converted_files_are_refused_with_both_sides(
    module: RepVGG, state: dict[str, Tensor]
) -> None:
    folded = deploy_skeleton(module).state_dict()
    mixed = {key: t for key, t in state.items() if not key.startswith("stage1.1.")}
    mixed.update({key: t for key, t in folded.items() if key.startswith("stage1.1.")})
    error = refusal(mixed)
    assert isinstance(error, MixedForm)
    assert "stage1.1.rbr_reparam.weight" in error.detail
    both = refusal({**state, **folded})
    assert isinstance(both, MixedForm)


def test_a_foreign_state_dict_is_unknown() -> None:
    error = refusal({"features.0.weight": torch.zeros(3, 3)})
    assert isinstance(error, UnknownArchitecture)
    assert "features.0.weight" in error.detail
    assert isinstance(refusal({}), UnknownArchitecture)


def test_a_named_architecture_that_contradicts_the_file(state: dict[str, Tensor]) -> None:
    assert isinstance(refusal(state, architecture="RepVGG-A0"), MissingKeys)
    assert recognise(state, ModelConfig(architecture="repvgg")).name == "RepVGG (custom)"
    wrong = refusal(state, architecture={"name": "RepVGG", "widths": [8, 24]})
    assert isinstance(wrong, ShapeMismatch)
    assert isinstance(refusal(state, architecture="DBB-ResNet-18"), RecognitionError)


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("RepVGG-A9", "architecture"),
        ({"name": "RepVGG", "depth": 3}, "architecture.depth"),
        ({"name": "RepVGG", "num_blocks": "many"}, "architecture"),
        ({"num_blocks": [1]}, "architecture.name"),
    ],
)
def test_a_wrong_architecture_is_an_invalid_config(
    state: dict[str, Tensor], architecture: str | dict[str, Any], field: str
) -> None:
    error = refusal(state, architecture=architecture)
    assert isinstance(error, InvalidConfig)
    assert error.extra["field"] == field


def test_input_channels_and_labels_must_agree_with_the_file(state: dict[str, Tensor]) -> None:
    assert refusal(state, input_shape=(1, 32, 32)).extra["field"] == "input_shape"
    assert refusal(state, labels=("a", "b")).extra["field"] == "labels"
    found = recognise(state, ModelConfig(labels=tuple("abcde"), input_shape=(3, 32, 32)))
    assert found.input_shape == (3, 32, 32)


def test_counters_may_be_absent_and_half_precision_is_taken_up(
    module: RepVGG, state: dict[str, Tensor]
) -> None:
    x = torch.randn(2, 3, 32, 32)
    bare = {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}
    assert bare != state
    torch.testing.assert_close(build(recognise(bare), bare)(x), module(x), rtol=0, atol=0)
    halves = {k: t.half() if t.is_floating_point() else t for k, t in state.items()}
    rebuilt = build(recognise(halves), halves)
    assert {p.dtype for p in rebuilt.parameters()} == {torch.float32}
    assert rebuilt.get_parameter(KEY).equal(state[KEY].half().float())


def test_profiler_counters_do_not_matter(state: dict[str, Tensor]) -> None:
    state["total_ops"] = torch.zeros(1)
    state["stage0.total_params"] = torch.zeros(1)
    assert recognise(state).name == "RepVGG (custom)"
    build(recognise(state), state)


def test_building_from_another_state_dict_is_refused(state: dict[str, Tensor]) -> None:
    recognition = recognise(state)
    del state[KEY]
    with pytest.raises(MissingKeys):
        build(recognition, state)


def test_the_deploy_form_loads_strictly_and_computes_its_one_convolution(module: RepVGG) -> None:
    skeleton = deploy_skeleton(module).eval()
    state = skeleton.state_dict()
    recognition = recognise(state)
    assert recognition.form == "deploy"
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(build(recognition, state)(x), skeleton(x), rtol=0, atol=0)
    assert not any("rbr_dense" in key for key in state)
    # The module it was made from still has its branches.
    assert KEY in module.state_dict()


def test_evidence_and_assumptions_are_sentences(state: dict[str, Tensor]) -> None:
    found = recognise(state)
    assert found.evidence
    assert all(s.endswith(".") for s in (*found.evidence, *found.assumed))
    assert any("3x224x224" in s for s in found.assumed)


def test_plain_networks_of_the_same_layout_are_recognised() -> None:
    with torch.device("meta"):
        state = ResNet("base", "basic", [1, 1, 1, 1]).state_dict()
    assert recognise(state).name == "Plain-ResNet (custom)"
