"""Exports of programs, inside this process: what is checked, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.checkpoint.child import ChildLimits
from service.errors import ExportFailed, FormatNotInstalled
from service.exports import files
from service.exports.convert import check, to_onnx, to_openvino
from service.graph import Program, run, trace


class Two(nn.Module):
    """Two inputs and two outputs, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.relu(self.first(x)) + self.second(y)
        return scores, scores.argmax(dim=1)


@pytest.fixture(scope="module")
def program() -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trace(Two().eval(), (torch.zeros(2, 3), torch.zeros(2, 2)))


def test_several_inputs_and_outputs_keep_their_names(program: Program, tmp_path: Path) -> None:
    import onnxruntime

    to_onnx(program, tmp_path / "deploy.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "deploy.onnx")
    assert [(each.name, each.shape) for each in session.get_inputs()] == [
        ("input_0", ["batch", 3]),
        ("input_1", ["batch", 2]),
    ]
    rows = [torch.randn(7, 3), torch.randn(7, 2)]
    truth = run(program, *rows)
    found = session.run(
        ["output_0", "output_1"], {f"input_{i}": each.numpy() for i, each in enumerate(rows)}
    )
    assert np.allclose(found[0], truth[0].numpy(), atol=1e-6)
    assert (found[1] == truth[1].numpy()).all()
    to_openvino(program, tmp_path)
    assert 'names="output_1"' in (tmp_path / "deploy.xml").read_text()


def engine_of(program: Program, change: Any) -> Any:
    def engine(rows: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        outputs = [each.numpy() for each in run(program, *(torch.from_numpy(r) for r in rows))]
        return list(change(outputs))

    return engine


@pytest.mark.parametrize(
    "change",
    [
        lambda outputs: [outputs[0] * 1.01, outputs[1]],
        lambda outputs: [np.where(outputs[0] > 1, np.nan, outputs[0]), outputs[1]],
        lambda outputs: [outputs[0][:1].repeat(len(outputs[0]), 0), outputs[1]],  # the batch fixed
        lambda outputs: outputs[:1],
    ],
    ids=["scaled", "not finite", "first row only", "output missing"],
)
def test_another_engine_that_differs_is_refused(program: Program, change: Any) -> None:
    check(program, engine_of(program, lambda outputs: outputs))  # the control
    with pytest.raises(ExportFailed, match="outputs differ on"):
        check(program, engine_of(program, change))


def test_a_network_that_cannot_be_exported_says_why(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("No decompositions registered for aten.odd\nmore lines")

    monkeypatch.setattr("torch.onnx.export", refuse)
    with pytest.raises(ExportFailed, match=r"to ONNX: No decompositions registered .*odd$"):
        to_onnx(program, tmp_path / "deploy.onnx")


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    kind = files.Format("onnx", "onnx", "onnx", ("onnx", "not_a_package"))
    with pytest.raises(FormatNotInstalled) as caught:
        files.export_file(tmp_path / "x", kind, tmp_path, ChildLimits())
    assert "not_a_package" in caught.value.detail
    assert "foldserve[onnx]" in caught.value.remedy
