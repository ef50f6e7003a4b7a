"""Checkpoints named at the start are converted and served, once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from service.demo.files import save_checkpoint
from service.errors import BadInput, InvalidConfig, NameInvalid
from service.networks import RepVGG
from service.provision import Provision
from tests.running import ROOT, running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A volume as it is mounted: one checkpoint and its config."""
    volume = tmp_path / "volume"
    volume.mkdir()
    torch.manual_seed(0)
    save_checkpoint(RepVGG([1, 1, 1, 1], [8, 8, 16, 32], num_classes=3), volume / "tiny.pth")
    (volume / "config.json").write_text('{"input_shape": [3, 32, 32], "labels": ["a", "b", "c"]}')
    return volume


def test_a_folder_is_served_from_the_start_and_not_converted_twice(
    folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    for _ in range(2):
        with running(data, {}, "--model", f"tiny={folder}") as server:
            answer = httpx.post(
                f"{server.url}/v1/models/tiny/predict",
                json={"inputs": np.zeros((1, 3, 32, 32)).tolist()},
            )
            assert answer.status_code == 200, answer.text
            labels = {top["label"] for top in answer.json()["predictions"][0]["top"]}
            assert labels == {"a", "b", "c"}
            versions = httpx.get(f"{server.url}/v1/models/tiny/versions").json()["items"]
            assert [version["version"] for version in versions] == [1]
            assert versions[0]["checkpoint"]["filename"] == "tiny.pth"


def test_other_bytes_are_the_next_version(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running(data, {"FOLDSERVE_MODELS": f"tiny={folder / 'tiny.pth'}"}):
        pass
    save_checkpoint(RepVGG([1, 1, 1, 1], [8, 8, 16, 32], num_classes=3), folder / "tiny.pth")
    with running(data, {"FOLDSERVE_MODELS": f"tiny={folder / 'tiny.pth'}"}) as server:
        model = httpx.get(f"{server.url}/v1/models/tiny").json()
        assert model["default_version"] == 2


def test_a_wrong_place_ends_the_start_with_a_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(
        [*command, "--port", "0", "--model", f"a={tmp_path / 'nothing.pth'}"],
        cwd=ROOT,
        env={"FOLDSERVE_LOG_FORMAT": "json", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "does not exist" in json.loads(done.stderr.splitlines()[-1])["detail"]


def test_what_is_named_is_checked(folder: Path) -> None:
    assert Provision.parse(f"tiny={folder}").checkpoint == folder / "tiny.pth"
    with pytest.raises(BadInput, match="NAME=PATH"):
        Provision.parse("tiny")
    with pytest.raises(NameInvalid):
        Provision.parse(f"Tiny!={folder}")
    (folder / "other.pth").write_bytes(b"")
    with pytest.raises(BadInput, match="holds 2 checkpoints"):
        Provision.parse(f"tiny={folder}")
    (folder / "config.json").write_text('{"labls": []}')
    with pytest.raises(InvalidConfig, match="labls"):
        Provision.parse(f"tiny={folder / 'tiny.pth'}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_ends_the_start_and_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError) as caught,
        running(tmp_path / "data", {"FOLDSERVE_DEVICE": "cuda"}),
    ):
        pass
    assert "sees no such device" in str(caught.value)
    assert "FOLDSERVE_DEVICE=auto" in str(caught.value)
