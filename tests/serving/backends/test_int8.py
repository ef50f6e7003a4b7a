"""int8 on a network trained for real: certified on inputs that set no range, refused otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.demo import digits
from service.errors import BackendFailed, CertificateFailed
from service.fusion import fuse
from service.graph import Program, trace
from service.serving import Prepared, backend_named


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load_digits()


@pytest.fixture(scope="module")
def program(data: digits.Digits) -> Program:
    """The deploy form of a RepVGG that knows its digits."""
    network = digits.train(replace(digits.RECIPES[0], epochs=5), data)
    assert digits.accuracy(network, data) > 0.95
    return fuse(trace(network, (torch.zeros(1, 1, digits.SIDE, digits.SIDE),))).program


def _prepare(program: Program, calibration: Tensor | None) -> Prepared:
    own = None if calibration is None else (calibration,)
    prepared = backend_named("auto", threads=1).prepare(program, "cpu", "int8", (1, 8), own)
    list(prepared.warm())
    return prepared


def test_it_keeps_the_digits_with_ranges_from_the_users_inputs(
    program: Program, data: digits.Digits
) -> None:
    prepared = _prepare(program, data.train_images[:256])
    accuracy = prepared.describe().accuracy
    assert accuracy["inputs"] == "calibration"
    assert accuracy["rows"] == 128
    assert accuracy["top1_agreement"] >= 0.98
    assert accuracy["error"] > 1e-3  # or it was not computed in int8 at all
    assert "256" not in prepared.describe().notes[0]  # half of them were held out
    rows = torch.split(data.test_images, 8)
    named = torch.cat([prepared.run((each,))[0].argmax(1) for each in rows])
    assert float((named == data.test_labels).float().mean()) > 0.93


def test_ranges_of_other_inputs_are_refused_with_the_numbers(
    program: Program, data: digits.Digits
) -> None:
    images = data.train_images[:128].clone()
    images[::2] *= 0.05  # the half that sets the ranges is far dimmer than the half that certifies
    with pytest.raises(CertificateFailed) as refused:
        _prepare(program, images)
    numbers = refused.value.extra["accuracy"]
    assert numbers["top1_agreement"] < 0.9
    assert numbers["error"] > numbers["error_limit"]


def test_without_inputs_the_remedy_is_told(program: Program) -> None:
    with pytest.raises(BackendFailed, match="inputs of yours") as refused:
        _prepare(program, None)
    assert "calibration" in refused.value.remedy
