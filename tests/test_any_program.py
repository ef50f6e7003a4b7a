"""Networks nobody here knows, packed with `service.pack`: any rank, several inputs and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import service
from service.graph import load_program, run
from service.networks import ModelConfig
from service.pipeline import convert


class Pair(nn.Module):
    """Two images in; scores and a feature map out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.norm(self.conv(image)) + self.point(image)
        return self.head((mixed + self.other(depth)).relu().mean((2, 3))), mixed


class Tokens(nn.Module):
    """Token numbers and a mask in, scores and a table that no input reaches out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(10, 6), nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 3)
        self.register_buffer("table", torch.full((4, 2), 0.1))

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.second(self.first(self.embed(tokens))) * mask.unsqueeze(2)
        return {"scores": x.mean(1), "table": self.table * 0.1 + 0.2}


def audio() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(1, 8, 9, 2, 4, bias=False), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def volume() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.BatchNorm1d(16), nn.Linear(16, 4)),
    )


def images(*shape: int) -> Tensor:
    return torch.randn(3, *shape)


CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...], int]] = {
    "two images": (Pair(), (images(3, 8, 8), images(2, 8, 8)), 1),
    "tokens": (Tokens(), (torch.randint(0, 10, (3, 7)), images(7)), 1),
    "audio": (audio(), (images(1, 64),), 1),
    "volume": (volume(), (images(1, 6, 6, 6),), 1),
    "perceptron": (perceptron(), (images(12),), 2),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_packed_converted_and_runs(name: str, tmp_path: Path) -> None:
    module, example, fused = CASES[name]
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            assert part.running_mean is not None
            part.running_mean.normal_()
    bundle = service.pack(module.eval(), tuple(x[:1] for x in example), tmp_path / "net.bundle")
    done = convert(bundle, ModelConfig(), tmp_path)
    assert done.fusion["fused"] == fused
    assert done.fusion["certificate"]["passed"]
    with torch.no_grad():
        wanted = module(*example)
    wanted = list(wanted.values()) if isinstance(wanted, dict) else wanted
    found = run(load_program(Path(done.files["deploy_program"])), *example)
    torch.testing.assert_close(
        list(found), [wanted] if isinstance(wanted, Tensor) else list(wanted)
    )
    inputs = f"{len(example)} input"
    assert any(inputs in sentence for sentence in done.architecture["evidence"])


def test_an_input_without_a_batch_axis_is_refused_by_name(tmp_path: Path) -> None:
    from dataclasses import replace

    from service.errors import InvalidProgram
    from service.graph import save_program, trace

    program = trace(Pair().eval(), (images(3, 8, 8), images(2, 8, 8)))
    first, second = program.inputs
    fixed: Any = replace(program, inputs=(first, replace(second, shape=(1, *second.shape[1:]))))
    save_program(fixed, tmp_path / "net.bundle")
    with pytest.raises(InvalidProgram, match=second.name):
        convert(tmp_path / "net.bundle", ModelConfig(), tmp_path)


def test_the_certificate_probes_every_input(tmp_path: Path) -> None:
    module, example, _ = CASES["two images"]
    bundle = service.pack(module, example, tmp_path / "net.bundle")
    done = convert(bundle, ModelConfig(), tmp_path)
    report = json.loads(Path(done.files["report"]).read_text())
    assert report["certificate"]["error_end_to_end"] > 0
    assert report["certificate"]["output_variation"] > 0.01
