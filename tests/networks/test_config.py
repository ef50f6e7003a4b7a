"""The config JSON: what it may hold and how a mistake is named."""

from __future__ import annotations

import pytest

from service.errors import InvalidConfig
from service.networks import ModelConfig, Preprocessing

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
