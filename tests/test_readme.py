"""The README tells the truth: its commands run as they stand, its tables come from the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.demo.files import photograph, save_checkpoint
from service.networks import RepVGG
from service.networks.table import FAMILIES
from service.settings import Settings
from tests.running import RunningServer, running

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert found is not None, f"the README has no section {title!r}"
    return found[1]


def code(title: str, language: str) -> list[str]:
    """The code blocks of a section."""
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.M | re.S)


def rows(title: str) -> list[list[str]]:
    """The cells of the first table of a section, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the tour assumes it: a training checkpoint (a small one) and an image."""
    folder = tmp_path_factory.mktemp("tour")
    torch.manual_seed(0)
    network = RepVGG([1, 1, 1, 1], [8, 8, 16, 32], num_classes=12)
    save_checkpoint(network, folder / "RepVGG-A0-train.pth")
    (folder / "cat.jpg").write_bytes(photograph())
    return folder


@pytest.fixture(scope="module")
def tour_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A service of the tour's own, because its model must get version 1."""
    with running(tmp_path_factory.mktemp("tour-server") / "data", fresh=True) as server:
        yield server


def run(command: str, folder: Path) -> str:
    own = {k: v for k, v in os.environ.items() if not k.startswith("FOLDSERVE_")}
    own["PYTHONPATH"] = str(ROOT)
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=own, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_line_of_the_tour_runs(tour_server: RunningServer, folder: Path) -> None:
    (block,) = code("A tour with curl", "sh")
    lines = block.splitlines()
    assert len(lines) == 5
    answers = []
    for line in lines:
        assert line.startswith("curl ")
        assert ADDRESS in line
        command = line.replace(ADDRESS, tour_server.url)
        answers.append(run(command.replace("curl ", "curl -sS --fail-with-body ", 1), folder))

    uploaded, report, predicted, measured = (json.loads(answer) for answer in answers[:4])
    assert uploaded["state"] == "ready"
    assert uploaded["fusion"]["fused"] == 5
    assert {block["status"] for block in report["blocks"]} == {"fused"}
    assert len(predicted["predictions"][0]["top"]) == 3
    assert [batch["batch_size"] for batch in measured["batches"]] == [1, 8]
    deploy = torch.load(folder / "deploy.pth", weights_only=True)
    assert deploy["stage0.rbr_reparam.weight"].shape == (8, 3, 3, 3)


def test_a_tour_line_that_is_refused_fails(tour_server: RunningServer, folder: Path) -> None:
    with pytest.raises(AssertionError, match="model_not_found"):
        run(f"curl -sS --fail-with-body {tour_server.url}/v1/models/nobody", folder)


def test_the_command_examples_run(folder: Path) -> None:
    (block,) = code("The command and the client", "sh")
    inspect, convert = block.splitlines()
    for line in (inspect, convert):
        name, *arguments = shlex.split(line)
        assert name == "foldserve"
        run(shlex.join([sys.executable, "-m", "service.cli", *arguments]), folder)
    assert torch.load(folder / "RepVGG-A0-deploy.pth", weights_only=True)
    assert json.loads((folder / "report.json").read_text())["blocks"]


def test_the_client_example_runs(
    tour_server: RunningServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = code("The command and the client", "python")
    assert block.count(ADDRESS) == 1
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(block.replace(ADDRESS, tour_server.url), names)
    assert names["version"].state == "ready"
    assert len(names["labels"][0]) == 5


def test_the_configuration_page_is_the_settings() -> None:
    """`make docs` writes it."""
    assert (ROOT / "docs" / "configuration.md").read_text() == Settings.page()


def test_the_families_are_those_of_the_code() -> None:
    wanted = defaultdict(list)
    for family in FAMILIES:
        wanted[family.family].append(f"`{family.network}`")
    assert rows("What converts") == [[name, ", ".join(wanted[name])] for name in sorted(wanted)]


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M))
    assert {"demo", "test", "serve", "lint", "bench", "soak"} <= named
    assert named <= targets


def test_places_that_are_named_exist() -> None:
    for row in rows("Where things are"):
        for place in re.findall(r"`([^`]+)`", row[0]):
            assert (ROOT / place).exists(), place


def test_it_stays_short() -> None:
    assert README.count("\n") < 300
