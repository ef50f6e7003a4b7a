"""The config JSON: what it may hold and how a mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidConfig
from service.networks import PRESETS, ModelConfig, Preprocessing, parse_changes

FULL = """{
  "architecture": {"name": "RepVGG", "stem_stride": 1},
  "input_shape": [1, 8, 8],
  "preprocessing": {"resize": 8, "mean": [0.5], "std": [0.25], "interpolation": "bicubic"},
  "labels": ["zero", "one"],
  "weights": "ema",
  "backend": "torch",
  "precision": "float32"
}"""


def test_a_full_config_is_parsed_and_round_trips() -> None:
    config = ModelConfig.from_json(FULL)
    assert config.input_shape == (1, 8, 8)
    assert config.preprocessing == Preprocessing(
        resize=8, mean=(0.5,), std=(0.25,), interpolation="bicubic"
    )
    requested = config.requested()
    assert (requested.name, requested.values) == ("RepVGG", {"stem_stride": 1})
    assert ModelConfig.from_json(config.to_json()) == config


def test_empty_text_and_an_empty_object_are_the_defaults() -> None:
    assert ModelConfig.from_json("") == ModelConfig.from_json("{}") == ModelConfig()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"architekture": "RepVGG-A0"}', "architekture"),
        ('{"preprocessing": {"means": [0]}}', "preprocessing.means"),
        ('{"input_shape": []}', "input_shape"),
        ('{"input_shape": [3, 224, 0]}', "input_shape.2"),
        ('{"input_shape": [3, 224, "224"]}', "input_shape.2"),
        ('{"weights": "best"}', "weights"),
        ('{"preprocessing": {"std": [0.0]}}', "preprocessing.std.0"),
        ('{"preprocessing": {"mean": [NaN]}}', "preprocessing.mean.0"),
        ('{"preprocessing": {"crop": "left"}}', "preprocessing.crop"),
        ('{"preprocessing": "imagenet21"}', "preprocessing.preset"),
        ('{"preprocessing": {"preset": 5}}', "preprocessing.preset"),
        ('{"preprocessing": {"preset": "cifar10", "means": [0]}}', "preprocessing.means"),
        ('{"labels": "cat"}', "labels"),
        ('{"architecture": 3}', "architecture"),
        ('{"architecture": {"depth": 3}}', "architecture.name"),
        ('{"backend": "../x"}', "backend"),
        ("[1]", "config"),
        ("not json", "config"),
    ],
)
def test_a_mistake_names_its_field(text: str, field: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        ModelConfig.from_json(text)
    assert caught.value.extra["field"].startswith(field)
    assert field in caught.value.detail


def test_a_preset_fills_in_what_is_not_given() -> None:
    alone = ModelConfig.from_json('{"preprocessing": "cifar10"}').preprocessing
    named = ModelConfig.from_json('{"preprocessing": {"preset": "cifar10"}}').preprocessing
    assert alone == named
    assert alone is not None
    assert (alone.preset, alone.mean, alone.crop) == ("cifar10", (0.4914, 0.4822, 0.4465), "none")
    own = ModelConfig.from_json('{"preprocessing": {"preset": "caffe", "std": [1]}}')
    assert own.preprocessing is not None
    assert (own.preprocessing.channel_order, own.preprocessing.std) == ("bgr", (1.0,))
    assert ModelConfig.from_json(own.to_json()) == own


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_preprocessing(name: str) -> None:
    found = ModelConfig.from_json(f'{{"preprocessing": "{name}"}}').preprocessing
    assert found is not None
    assert len(found.mean) == len(found.std)
    assert found != Preprocessing(preset=name) or name == "imagenet"


def test_only_labels_and_preprocessing_change_later() -> None:
    assert parse_changes('{"labels": ["a"], "preprocessing": null}').labels == ("a",)
    for text in ("", "{}", '{"backend": "torch"}', '{"labels": null, "precision": "auto"}'):
        with pytest.raises(InvalidConfig):
            parse_changes(text)


@pytest.mark.parametrize("name", PRESETS)
def test_the_page_shows_every_preset_as_it_is(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs/preprocessing.md").read_text()
    values = PRESETS[name]
    mean, std = (", ".join(f"{x:.6g}" for x in values[key]) for key in ("mean", "std"))
    rest = ", ".join(f"{key} {x}" for key, x in values.items() if key not in ("mean", "std"))
    assert f"| `{name}` | {mean} | {std} | {rest} |\n" in page
