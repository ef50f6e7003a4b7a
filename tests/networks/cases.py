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


# What the keys cannot tell and an uploader must say.
SAID = {
    "replknet31b_small_deepfuse": {"network": "RepLKNet", "deep_fuse": True},
    "ecbsr": {"network": "ECBSR", "with_idt": True},
}
BLOCKS = {
    "blk_repvgg": "RepVGGBlock",
    "blk_dbb": "DiverseBranchBlock",
    "blk_yolov6_repvgg": "RepVGGBlock",
    "blk_acb": "ACBlock",
    "blk_orepa_k": "OREPA",
    "blk_orepa_odd": "OREPA",
    "blk_orepa_1x1": "OREPA_1x1",
    "blk_orepa_large": "OREPA_LargeConv",
    "blk_orepa_vgg": "RepVGGBlock_OREPA",
    "blk_yolov7_repconv_orepa": "RepVGGBlock_OREPA",
    "blk_mobileone": "MobileOneBlock",
    "blk_fastvit_lkb": "ReparamLargeKernelConv",
    "blk_fastvit_repcpe": "RepCPE",
    "blk_fastvit_repmixer": "RepMixer",
    "blk_unirep_dilated": "DilatedReparamBlock",
    "blk_ecb": "ECB",
    "blk_yolov6_qarepvgg": "YOLOv6-QARepVGGBlock",
    "blk_repvit_bn_linear": "BN_Linear",
    "blk_repvit_repvggdw": "RepVGGDW",
    "blk_timm_repvggdw_legacy": "RepVGGDW",
    "blk_yolov9_repconvn": "RepConv",
    "blk_ultralytics_repconv": "RepConv",
    "blk_rtdetr": "RTDETR-RepVggBlock",
    "blk_yolov10_repvggdw": "YOLOv10-RepVGGDW",
    "blk_yolov7_repconv": "YOLOv7-RepConv",
    "blk_yolov7_implicit": "YOLOv7-ImplicitHead",
    "blk_sg_qarepvgg": "SG-QARepVGGBlock",
    "blk_sg_repvgg": "SG-RepVGGBlock",
    "blk_yolov6_linearadd": "YOLOv6-LinearAddBlock",
}


def network_of(name: str) -> str | None:
    """The block class of a bare-block case: the longest prefix that the table has."""
    prefixes = [prefix for prefix in BLOCKS if name.startswith(prefix)]
    return BLOCKS[max(prefixes, key=len)] if prefixes else None


def said(name: str) -> dict[str, Any]:
    """Arguments of `built` for a case: what its keys cannot tell."""
    values = next((values for prefix, values in SAID.items() if name.startswith(prefix)), {})
    return {"network": network_of(name), **values}


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
    """How far a float64 module is from the official training form, relative; the worst of four."""
    return output_error(name, outputs(module, input_of(name).double()))


def output_error(name: str, got: Tensor) -> float:
    """How far outputs (N, values) are from the official ones, relative; the worst of four.

    The case holds ten values an image, the mean, the norm and a position-dependent sum.
    """
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
