"""The conformance cases: state dicts, inputs and outputs of the projects' official code."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.networks import ModelConfig, Recognition, build, recognise
from service.networks.table import FAMILIES

FOLDER = Path(
    os.environ.get("FOLDSERVE_CONFORMANCE")
    or Path(__file__).resolve().parents[3] / "shared" / "conformance"
)
needs_cases = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no conformance cases in {FOLDER}; set FOLDSERVE_CONFORMANCE"
)
Case = dict[str, Any]


def names(*prefixes: str) -> list[str]:
    """The cases whose name begins with one of `prefixes`; none where the folder is absent."""
    stems = sorted(path.stem for path in FOLDER.glob("*.json")) if FOLDER.is_dir() else []
    return [stem for stem in stems if stem.startswith(prefixes)]


@cache
def load(name: str) -> Case:
    """One case, as its JSON says."""
    case: Case = json.loads((FOLDER / f"{name}.json").read_text())
    return case


@cache
def _rule() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance_rebuild", FOLDER / "rebuild.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state_of(name: str) -> dict[str, Tensor]:
    """The training-form state dict."""
    return dict(_rule().rebuild(load(name)))


def input_of(name: str) -> Tensor:
    """The input batch, float32."""
    x: Tensor = _rule().make_input(load(name))
    return x


def config_of(name: str, network: str | None = None, **more: Any) -> ModelConfig:
    """The config an uploader of this case would write: its input shape, and a bare block's values.

    Values that the constructor of `network` does not have are left out.
    """
    case = load(name)
    config: dict[str, Any] = {"input_shape": case["input"]["shape"][1:]}
    if network is not None:
        row = next(row for row in FAMILIES if row.network == network)
        values = {k: v for k, v in (case.get("attrs") or {}).items() if k in row.parameters()}
        config["architecture"] = {"name": network, **values, **more}
    return ModelConfig.from_json(json.dumps(config))


def built(name: str, network: str | None = None, **more: Any) -> tuple[Recognition, nn.Module]:
    """The case recognised and built, in float64."""
    state = state_of(name)
    recognition = recognise(state, config_of(name, network, **more))
    return recognition, build(recognition, state).double()


def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """(N, values): every output flattened per image and concatenated in order."""
    with torch.no_grad():
        return torch.cat([tensor.flatten(1) for tensor in _tensors(module(x))], 1)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def error_f64(name: str, module: nn.Module) -> float:
    """How far a float64 module is from the official training form, relative; the worst of four.

    The case holds ten values an image, the mean, the norm and a position-dependent sum.
    """
    got = outputs(module, input_of(name).double())
    expected = load(name)["train_f64"]
    first = torch.tensor(expected["first10"], dtype=torch.float64)
    mean, norm, places = _rule().summary(got)
    wanted = expected["mean_l2_cossum"]
    errors = [
        float((got[:, : first.shape[1]] - first).norm() / first.norm()),
        abs(mean - wanted[0]) * got.numel() ** 0.5 / wanted[1],
        abs(norm - wanted[1]) / wanted[1],
        abs(places - wanted[2]) / wanted[1],
    ]
    return max(errors)


def deploy_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The official deploy form's keys and shapes, in order."""
    return {key: tuple(shape) for key, shape, *_ in load(name)["deploy_state"]}
