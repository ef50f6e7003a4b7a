"""Networks that timm builds, through a module of that name written here, and without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.errors import InvalidConfig, MissingKeys, ShapeMismatch, UnexpectedKeys
from service.graph import load_program, run
from service.networks import ModelConfig, recognise
from service.pipeline import convert


class TwoBranches(nn.Module):
    """A network that no family here knows."""

    def __init__(self, num_classes: int = 4, width: int = 6, act_layer: str = "relu") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pretrained_cfg = {"input_size": (3, 12, 12)}
        self.one = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.other = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.act = nn.ReLU(inplace=True) if act_layer == "relu" else nn.GELU()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.act(self.one(x) + self.other(x)).mean((2, 3)))
        return out


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts a `timm` in place; gets what its factory was called with."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, pretrained: bool = True, **values: Any) -> nn.Module:
        calls.append({"name": name, "pretrained": pretrained, **values})
        if name != "two_branches.in1k":
            raise RuntimeError(f"Unknown model ({name})")
        return TwoBranches(**values)

    module = ModuleType("timm")
    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    return calls


def config(name: str = "timm/two_branches.in1k", **values: Any) -> ModelConfig:
    return ModelConfig.from_json(json.dumps({"architecture": {"name": name, **values}}))


def trained(**values: Any) -> nn.Module:
    network = TwoBranches(**values).eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
            part.running_mean = torch.randn(part.num_features)
    return network


def test_it_is_built_fused_certified_and_runs(timm: list[dict[str, Any]], tmp_path: Path) -> None:
    network = trained(num_classes=5, act_layer="gelu")
    torch.save(network.state_dict(), tmp_path / "train.pth")
    said = config(num_classes=5, act_layer="gelu")
    done = convert(tmp_path / "train.pth", said, tmp_path)
    assert all(call["pretrained"] is False for call in timm)
    assert timm[0] == {
        "name": "two_branches.in1k",
        "pretrained": False,
        "num_classes": 5,
        "act_layer": "gelu",
    }
    assert done.architecture["family"] == "timm"
    assert done.architecture["num_classes"] == 5
    assert done.architecture["input_shape"] == [3, 12, 12]
    assert done.fusion["certificate"]["passed"]
    assert (done.fusion["convolutions_before"], done.fusion["convolutions_after"]) == (2, 1)
    x = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            run(load_program(Path(done.files["deploy_program"])), x)[0], network(x)
        )


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda state: state.pop("one.0.weight"), MissingKeys),
        (lambda state: state.update(more=torch.zeros(1)), UnexpectedKeys),
        (lambda state: state.update({"one.0.bias": torch.zeros(9)}), ShapeMismatch),
    ],
)
@pytest.mark.usefixtures("timm")
def test_the_keys_must_be_the_files(change: Any, error: type[Exception]) -> None:
    state = trained().state_dict()
    change(state)
    with pytest.raises(error):
        recognise(state, config())


@pytest.mark.parametrize(
    ("name", "values", "field"),
    [
        ("timm/two_branches.in1k", {"checkpoint_path": "/etc/passwd"}, "checkpoint_path"),
        ("timm/two_branches.in1k", {"pretrained": True}, "pretrained"),
        ("timm/two_branches.in1k", {"pretrained_cfg_overlay": "x"}, "pretrained_cfg_overlay"),
        ("timm/two_branches.in1k", {"cache_dir": "/tmp"}, "cache_dir"),
        ("timm/two_branches.in1k", {"width": [6]}, "width"),
        ("timm/hf-hub:someone/something", {}, "architecture"),
        ("timm/local-dir:/tmp", {}, "architecture"),
        ("timm/../x", {}, "architecture"),
    ],
)
def test_nothing_is_read_from_elsewhere(
    timm: list[dict[str, Any]], name: str, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidConfig) as raised:
        recognise(trained().state_dict(), config(name, **values))
    assert raised.value.extra["field"].endswith(field)
    assert timm == []


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("timm/three_branches", {}, "Unknown model"),
        ("timm/two_branches.in1k", {"depth": 3}, "depth"),
    ],
)
def test_what_timm_does_not_build_is_a_wrong_config(
    name: str, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidConfig, match=says):
        recognise(trained().state_dict(), config(name, **values))


@pytest.mark.usefixtures("timm")
def test_labels_must_fit() -> None:
    said = {"architecture": "timm/two_branches.in1k", "labels": ["a", "b"]}
    with pytest.raises(InvalidConfig, match="4 classes"):
        recognise(trained().state_dict(), ModelConfig.from_json(json.dumps(said)))


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    with pytest.raises(InvalidConfig, match="cannot be imported") as raised:
        recognise(trained().state_dict(), config())
    assert "pip install timm" in raised.value.remedy
