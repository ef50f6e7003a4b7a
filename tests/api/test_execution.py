"""How a version runs: the measured choice of an engine, lower precisions, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from service.cli import app
from service.client import Client
from service.errors import InvalidConfig
from tests.api import tiny
from tests.api.problem import problem
from tests.running import running

AUTO = {"FOLDSERVE_BACKEND": "auto", "FOLDSERVE_MAX_BATCH": "4"}
NPY = {"Content-Type": tiny.NPY, "Accept": tiny.NPY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("execution") / "data"


@pytest.fixture(scope="module")
def auto(folder: Path) -> Iterator[httpx.Client]:
    """A service that chooses, with the tiny network as `tiny`."""
    with (
        running(folder, AUTO) as server,
        httpx.Client(base_url=server.url, timeout=200) as client,
    ):
        assert _upload(client, "tiny").status_code == 201
        yield client


def _upload(
    client: httpx.Client, model: str, calibration: bytes | None = None, **config: Any
) -> httpx.Response:
    files: dict[str, Any] = {"checkpoint": ("tiny.pth", tiny.checkpoint())}
    if calibration is not None:
        files["calibration"] = ("inputs.npy", calibration)
    return client.post(
        f"/v1/models/{model}/versions",
        files=files,
        data={"config": json.dumps(tiny.CONFIG | config)},
        headers={"Prefer": "wait=180"},
    )


def _error(client: httpx.Client, model: str) -> float:
    rows = tiny.rows(6)
    answer = client.post(f"/v1/models/{model}/predict", content=tiny.npy(rows), headers=NPY)
    truth = tiny.expected(rows)
    return float(np.abs(tiny.from_npy(answer.content) - truth).max() / np.abs(truth).max())


def test_the_choice_is_measured_said_and_remembered(auto: httpx.Client, folder: Path) -> None:
    execution = auto.get("/v1/models/tiny/versions/1").json()["execution"]
    assert execution["precision"] == "float32"
    assert set(execution["candidates"]) == {"torch", "openvino"}
    fastest = min(execution["candidates"].items(), key=lambda item: item[1])
    assert execution["backend"] == fastest[0] or fastest[1] > 0.98
    (model,) = [m for m in auto.get("/health").json()["models"] if m["model"] == "tiny"]
    assert model["forms"]["deploy"]["candidates"] == execution["candidates"]
    assert _error(auto, "tiny") < 1e-4
    chosen = json.loads((folder / "choices.json").read_text())
    assert {key.partition(" ")[0] for key in chosen} >= {"backend", "torch"}
    again = _upload(auto, "twin").json()["execution"]  # the same structure: not measured again
    assert again["candidates"] == execution["candidates"]
    assert again["backend"] == execution["backend"]


def test_bfloat16_is_certified_with_numbers(auto: httpx.Client) -> None:
    answer = _upload(auto, "half", precision="bfloat16")
    assert answer.status_code == 201, answer.text
    execution = answer.json()["execution"]
    assert execution["precision"] == "bfloat16"
    accuracy = execution["accuracy"]
    assert accuracy["passed"] is True
    assert 1e-4 < accuracy["error"] < accuracy["error_limit"]
    assert accuracy["inputs"] == "random"
    assert 1e-4 < _error(auto, "half") < 0.1


def test_int8_needs_inputs_to_calibrate_it(auto: httpx.Client) -> None:
    refused = problem(_upload(auto, "small", precision="int8"), 422, "invalid_config")
    assert refused["field"] == "precision"
    assert "calibration" in refused["remedy"]


@pytest.mark.parametrize(
    ("calibration", "word"),
    [
        (b"x", "npy"),
        (tiny.npy(tiny.rows(8)), "8 rows"),
        (tiny.npy(np.zeros((64, 3, 4, 4), np.float32)), "rows of shape"),
        (tiny.npy(np.full((64, *tiny.SHAPE), np.nan, np.float32)), "finite"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused(
    auto: httpx.Client, calibration: bytes, word: str
) -> None:
    answer = _upload(auto, "wrong", calibration, precision="int8")
    refused = problem(answer, 422, "invalid_config")
    assert refused["field"] == "calibration"
    assert word in refused["detail"]


def test_int8_that_changes_too_much_is_refused_with_numbers(auto: httpx.Client) -> None:
    """The half of the inputs that sets the ranges is far dimmer than the half that certifies."""
    rows = tiny.rows(128)
    rows[::2] *= 0.02
    answer = _upload(auto, "noise", tiny.npy(rows), precision="int8")
    refused = problem(answer, 422, "certificate_failed")
    assert refused["accuracy"]["passed"] is False
    assert refused["accuracy"]["top1_agreement"] < 0.98
    assert auto.get("/v1/models/noise/versions/1").json()["state"] == "rejected"


def test_the_command_and_the_client_send_calibration(auto: httpx.Client, tmp_path: Path) -> None:
    """Too few rows: the refusal counts those that arrived, from a file and from an array."""
    url = str(auto.base_url)
    (tmp_path / "net.pth").write_bytes(tiny.checkpoint())
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    (tmp_path / "rows.npy").write_bytes(tiny.npy(tiny.rows(8)))
    given = ["--config", str(tmp_path / "config.json"), "--precision", "int8", "--url", url]
    push = ["push", str(tmp_path / "net.pth"), *given]
    without = CliRunner().invoke(app, push)
    assert without.exit_code == 1
    assert "no inputs to calibrate" in " ".join(without.output.split())
    with_rows = CliRunner().invoke(app, [*push, "--calibration", str(tmp_path / "rows.npy")])
    assert with_rows.exit_code == 1
    assert "8 rows" in " ".join(with_rows.output.split())
    with Client(url) as client, pytest.raises(InvalidConfig, match="7 rows"):
        client.upload(
            tmp_path / "net.pth",
            config=tiny.CONFIG | {"precision": "int8"},
            calibration=tiny.rows(7),
            wait=60,
        )
