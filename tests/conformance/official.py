"""What the official code says of a case, and how far an answer of the service is from it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.networks import cases

BLOCKS = {"blk_repvgg": "RepVGGBlock", "blk_dbb": "DiverseBranchBlock"}
_ATTRIBUTES = ("stride", "groups")


def checkpoint(state: dict[str, Tensor]) -> bytes:
    """The state dict as `torch.save` writes it."""
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def config(name: str) -> dict[str, Any]:
    """What an uploader of this case says: the input shape, and what a bare block's keys hide."""
    case = cases.load(name)
    said: dict[str, Any] = {"input_shape": case["input"]["shape"][1:]}
    for prefix, block in BLOCKS.items():
        if name.startswith(prefix):
            attributes = {key: case["attrs"][key] for key in _ATTRIBUTES}
            said["architecture"] = {"name": block, **attributes}
    return said


def convolutions(name: str) -> tuple[int, int]:
    """Convolutions of the training form and of the official deploy form, told by their kernels."""
    case = cases.load(name)
    train = sum(
        len(shape) == 4 and key not in case["params_without_effect"]
        for key, shape, _ in case["state"]
    )
    return train, sum(len(shape) == 4 for _, shape in case["deploy_state"])


def gates(name: str) -> int:
    """Convolutions of squeeze-and-excitation, which no conversion touches."""
    keys = [key.split(".") for key, shape, _ in cases.load(name)["state"] if len(shape) == 4]
    return sum("se" in parts or "post_se" in parts for parts in keys)


def output_error(name: str, outputs: NDArray[np.float32]) -> float:
    """The worst relative difference from the official float64 output.

    `outputs` is (images, values). Compared are ten values of each image against their own norm, the
    mean and the position-dependent sum against what the norm allows, and the norm itself.
    """
    wanted = cases.load(name)["train_f64"]
    if list(outputs.shape) != wanted["shape"] or not np.isfinite(outputs).all():
        return float("inf")
    first = np.asarray(wanted["first10"])
    ten = outputs[:, : first.shape[1]].astype(np.float64)
    return max(
        float(np.linalg.norm(ten - first) / np.linalg.norm(first)),
        _summary_error(torch.from_numpy(outputs), wanted["mean_l2_cossum"]),
    )


def deploy_error(name: str, found: dict[str, Tensor]) -> float:
    """The worst relative difference of a tensor's checksums from the official deploy form.

    Infinite where keys, their order aside, or shapes differ. Counters of batch norm have no sums.
    """
    case = cases.load(name)
    wanted = {key: tuple(shape) for key, shape in case["deploy_state"]}
    if {key: tuple(tensor.shape) for key, tensor in found.items()} != wanted:
        return float("inf")
    counted = [key for key in wanted if not key.endswith("num_batches_tracked")]
    return max(_summary_error(found[key], case["deploy_sums"][key]) for key in counted)


def _summary_error(tensor: Tensor, wanted: list[float]) -> float:
    mean, norm, places = cases._rule().summary(tensor)
    root = tensor.numel() ** 0.5
    return max(
        abs(mean - wanted[0]) * root / wanted[1],
        abs(norm - wanted[1]) / wanted[1],
        abs(places - wanted[2]) / wanted[1],
    )


def npy(array: NDArray[np.float32]) -> bytes:
    """An array as an `application/x-npy` body."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def from_npy(body: bytes) -> NDArray[np.float32]:
    """(images, values) of an `application/x-npy` answer."""
    array: NDArray[np.float32] = np.load(io.BytesIO(body), allow_pickle=False)
    return array.reshape(len(array), -1)


def compact(value: Any) -> str:
    """JSON for a query or a form field."""
    return json.dumps(value, separators=(",", ":"))
