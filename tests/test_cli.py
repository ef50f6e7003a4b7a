from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import onnxruntime
import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from service import __version__
from service.cli import app
from service.commands import show
from service.networks import deploy_skeleton
from tests.api import tiny
from tests.running import ROOT, RunningServer, foldserve, running

COMMANDS = ["serve", "convert", "inspect", "pack", "push", "models", "predict", "benchmark", "demo"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny Net-train.pth"
    path.write_bytes(tiny.checkpoint())
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny.CONFIG))
    return path


def walked(command: Any) -> Iterator[Any]:
    """A command of click's and all that are below it."""
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from walked(each)


def test_help_of_everything() -> None:
    whole = foldserve("--help")
    assert whole.returncode == 0
    for command in COMMANDS:
        assert command in whole.stdout
    assert "Exit status: 0 done, 1 refused" in whole.stdout
    for command in walked(typer.main.get_command(app)):
        assert command.help, command.name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{command.name}: {parameter.name}"
    assert foldserve("convert", "--help").returncode == 0
    assert foldserve("--version").stdout.strip() == __version__
    assert foldserve("brew").returncode == 2


def test_convert_writes_the_deploy_form(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    output, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    done = foldserve(
        *("convert", str(checkpoint), "-o", str(output)),
        *("--config", str(config), "--report", str(report), "--arch", "RepVGG"),
    )
    assert done.returncode == 0, done.stderr
    assert "5 of 5 blocks fused" in done.stdout
    network = deploy_skeleton(tiny.network())
    network.load_state_dict(load_file(output))
    rows = tiny.rows(2)
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(rows)).numpy()
    assert abs(found - tiny.expected(rows)).max() < 1e-4
    assert len(json.loads(report.read_text())["blocks"]) == 5


def test_convert_writes_pth_and_bundles_and_json(
    checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.pth"
    done = foldserve(
        "convert", str(checkpoint), "-o", str(output), "--config", str(config), "--json"
    )
    assert json.loads(done.stdout)["fusion"]["fused"] == 5
    assert "stage1.0.rbr_reparam.bias" in torch.load(output, weights_only=True)


def test_convert_writes_other_engines_files(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    given = ("convert", str(checkpoint), "--config", str(config), "-o")
    onnx, zipped = tmp_path / "net.onnx", tmp_path / "net.openvino.zip"
    assert foldserve(*given, str(onnx)).returncode == 0
    rows = tiny.rows(3)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: rows})
    truth = tiny.expected(rows)
    assert abs(found - truth).max() < 1e-4 * abs(truth).max()
    assert foldserve(*given, str(zipped)).returncode == 0
    assert sorted(zipfile.ZipFile(zipped).namelist()) == ["deploy.bin", "deploy.xml"]


def test_a_refusal_names_code_detail_and_remedy(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pth"
    wrong.write_text("no weights")
    done = foldserve("convert", str(wrong), "-o", str(tmp_path / "out.pth"))
    assert done.returncode == 1
    assert "not_a_checkpoint" in done.stderr
    assert "safetensors" in done.stderr
    assert not (tmp_path / "out.pth").exists()
    assert foldserve("convert", str(tmp_path / "absent"), "-o", "x").returncode == 2


def test_inspect_gives_its_evidence(checkpoint: Path, config: Path) -> None:
    done = foldserve("inspect", str(checkpoint), "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert "RepVGG" in done.stdout
    assert "evidence" in done.stdout
    assert "Fused, each region into one operator (5)" in done.stdout
    assert "branch addition: Ding et al. 2021" in done.stdout
    assert "Readiness for int8" in done.stdout


@pytest.mark.parametrize("shape", [None, [3, 8, 8]])
def test_blocks_of_an_unknown_network_are_said_to_need_its_graph(
    shape: list[int] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = dict.fromkeys(("fused", "kept", "refused", "blocks"), 1)
    errors = {"error_float64": 1e-15, "error_end_to_end": 1e-7}
    architecture = {"family": "blocks", "name": "unknown", "input_shape": shape}
    show.certificate(architecture, counts | errors, "det.pt")
    assert ("cannot be served" in capsys.readouterr().out.replace("\n", " ")) == (shape is None)


def test_what_was_assumed_is_said_of_every_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict.fromkeys(("fused", "kept", "refused", "blocks"), 1)
    errors = {"error_float64": 1e-15, "error_end_to_end": 1e-7}
    architecture = {"family": "repvgg", "name": "RepVGG", "input_shape": [3, 8, 8]}
    show.certificate(architecture, counts | errors, "net.pth")
    assert "assumed" not in capsys.readouterr().out
    sentence = "The input is taken to be [3, 8, 8]."
    show.certificate(architecture | {"assumed": [sentence]}, counts | errors, "net.pth")
    assert f"assumed {sentence}" in capsys.readouterr().out


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a module of a user's own."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())\n"
        "def exported():\n"
        "    batch = {0: torch.export.Dim('batch')}\n"
        "    example = (torch.zeros(2, 3, 8, 8),)\n"
        "    return torch.export.export(net().eval(), example, dynamic_shapes=(batch,))\n"
        "def words():\n"
        "    return 'no network'\n"
    )
    return tmp_path


@pytest.mark.parametrize("given", [("mine:net", "--example", "2x3x8x8"), ("mine:exported",)])
def test_pack_then_convert_a_network_nobody_knows(mine: Path, given: tuple[str, ...]) -> None:
    bundle = mine / "mine.bundle"
    packed = subprocess.run(
        [sys.executable, "-m", "service.cli", "pack", *given, "-o", str(bundle)],
        cwd=mine,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert packed.returncode == 0, packed.stderr
    done = foldserve("convert", str(bundle), "-o", str(mine / "out.bundle"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fusion"]["convolutions_after"] == 1


@pytest.mark.parametrize(
    ("given", "status", "says"),
    [
        (("mine:net",), 2, "a module needs an --example"),
        (("mine:exported", "--example", "2x3x8x8"), 2, "leave out --example"),
        (("mine:words",), 2, "returns a str"),
        (("mine:absent",), 2, "absent"),
    ],
)
def test_what_cannot_be_packed_is_told(
    mine: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str, ...],
    status: int,
    says: str,
) -> None:
    monkeypatch.chdir(mine)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    packed = CliRunner().invoke(app, ["pack", *given, "-o", "mine.bundle"])
    assert packed.exit_code == status
    assert says in " ".join(packed.stderr.replace("\u2502", " ").split())
    assert not (mine / "mine.bundle").exists()


def test_remote_commands(
    server: RunningServer, checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    url = ("--url", server.url)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {number}" for number in range(tiny.CLASSES)) + "\n")
    given = ("--config", str(config), "--labels", str(names))
    pushed = foldserve("push", str(checkpoint), *given, *url)
    assert pushed.returncode == 0, pushed.stderr
    assert "tiny-net-train version 1" in pushed.stdout
    assert f"{server.url}/v1/models/tiny-net-train/predict" in pushed.stdout
    listed = json.loads(foldserve("models", "--json", FOLDSERVE_URL=server.url).stdout)
    assert "tiny-net-train" in [model["name"] for model in listed]
    assert "tiny-net-train" in foldserve("models", *url).stdout
    (model,) = [model for model in listed if model["name"] == "tiny-net-train"]
    assert model["versions"][0]["config"]["labels"][1] == "kind 1"
    chart = tmp_path / "chart.png"
    measure = ("benchmark", "tiny-net-train", "--batch", "1", "--batch", "2", "--seconds", "1")
    measured = foldserve(*measure, "--png", str(chart), *url)
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout.count("█") > 10
    assert chart.read_bytes().startswith(b"\x89PNG")
    missing = foldserve("benchmark", "nobody", *url)
    assert missing.returncode == 1
    assert "model_not_found" in missing.stderr


def test_remote_commands_without_a_service() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = foldserve("models", "--url", f"http://127.0.0.1:{port}")
    assert done.returncode == 1
    assert "foldserve serve" in done.stderr


def test_serve_says_ready_once_and_nothing_else_and_ends_with_zero(tmp_path: Path) -> None:
    with running(tmp_path / "data", fresh=True) as server:
        lines = server.log()
        assert [(line["event"], line["address"]) for line in lines] == [("ready", server.url)]
        assert server.stop() == 0
        assert [line["event"] for line in server.log()] == ["ready"]


def test_a_restart_finds_everything(tmp_path: Path) -> None:
    body, headers = tiny.npy(tiny.rows(1)), {"Content-Type": tiny.NPY, "Accept": tiny.NPY}
    with running(tmp_path / "data") as server:
        answer = httpx.post(
            f"{server.url}/v1/models/kept/versions",
            files={"checkpoint": ("tiny.pth", tiny.checkpoint())},
            data={"config": json.dumps(tiny.CONFIG)},
            headers={"Prefer": "wait=100"},
            timeout=120,
        )
        assert answer.status_code == 201, answer.text
        before = httpx.post(f"{server.url}/v1/models/kept/predict", content=body, headers=headers)
        assert server.stop() == 0
    with running(tmp_path / "data") as server:
        after = httpx.post(f"{server.url}/v1/models/kept/predict", content=body, headers=headers)
        assert after.content == before.content
        train = httpx.post(
            f"{server.url}/v1/models/kept/predict?form=train",
            content=body,
            headers=headers,
            timeout=60,
        )
        assert abs(tiny.from_npy(train.content) - tiny.from_npy(after.content)).max() < 1e-4


def test_a_kill_during_a_conversion_is_taken_up(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server:
        httpx.post(
            f"{server.url}/v1/models/interrupted/versions",
            files={"checkpoint": ("tiny.pth", tiny.checkpoint())},
            data={"config": json.dumps(tiny.CONFIG)},
        )
        server.process.send_signal(signal.SIGKILL)
        assert server.process.wait(10) == -signal.SIGKILL
    with running(tmp_path / "data") as server:
        deadline = time.monotonic() + 100
        state = None
        while state not in ("ready", "rejected") and time.monotonic() < deadline:
            url = f"{server.url}/v1/models/interrupted/versions/1"
            state = httpx.get(url).json()["state"]
            time.sleep(0.1)
        assert state == "ready"


def test_sigterm_lets_an_upload_under_way_finish(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server:
        host, port = server.url.removeprefix("http://").split(":")
        answers: list[bytes] = []
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/models/slow/versions HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n"
                b"Content-Type: application/octet-stream\r\n\r\nhalf"
            )
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)

            def finish() -> None:
                time.sleep(0.5)
                connection.sendall(b"half")
                answers.append(connection.recv(65536))

            thread = threading.Thread(target=finish)
            thread.start()
            thread.join(30)
        assert server.process.wait(30) == 0
    assert answers[0].startswith(b"HTTP/1.1 202 ")


def test_sigterm_ends_streams_and_waits(tmp_path: Path) -> None:
    with running(tmp_path / "data") as server, httpx.Client(base_url=server.url) as http:
        statuses: list[int] = []

        def upload() -> None:
            answer = http.post(
                "/v1/models/waiting/versions",
                files={"checkpoint": ("tiny.pth", tiny.checkpoint())},
                headers={"Prefer": "wait=100"},
                timeout=100,
            )
            statuses.append(answer.status_code)

        thread = threading.Thread(target=upload)
        thread.start()
        url = "/v1/models/waiting/versions/1/events"
        while http.get("/v1/models/waiting/versions/1").status_code == 404:
            time.sleep(0.01)
        with http.stream("GET", url, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            signalled = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert list(lines), "the stream ends by itself"
        thread.join(60)
        assert statuses[0] in (201, 202)
        assert server.process.wait(30) == 0
        assert time.monotonic() - signalled < 15


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"FOLDSERVE_PROT": "1"}, "nearest one is FOLDSERVE_PORT"),
        ({"FOLDSERVE_QUEUE_ROWS": "-1"}, "FOLDSERVE_QUEUE_ROWS=-1"),
    ],
)
def test_a_bad_setting_ends_the_start_with_words(environment: dict[str, str], word: str) -> None:
    done = foldserve("serve", **environment)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_ends_the_start_with_words(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = foldserve("serve", "--port", port, "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr
