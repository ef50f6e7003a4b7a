"""The parts of the demo on their own; `make demo` runs the whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from service.demo import digits, files, run, show
from service.demo.failure import DemoFailed
from service.demo.run import _Demo
from service.demo.server import Service
from service.networks import Reparameterizable, recognise

RECIPES = {recipe.model: recipe for recipe in digits.RECIPES}


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load_digits()


def test_the_split_is_whole_fixed_and_balanced(data: digits.Digits) -> None:
    assert data.train_images.shape == (1347, 1, 8, 8)
    assert data.test_images.shape == (450, 1, 8, 8)
    assert 0 <= data.train_images.min() <= data.train_images.max() <= 1
    assert torch.bincount(data.test_labels).tolist() == [45, 46, 44, 46, 45, 46, 45, 45, 43, 45]
    again = digits.load_digits()
    assert torch.equal(again.test_images, data.test_images)
    trained_on = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in trained_on for image in data.test_images)


@pytest.mark.parametrize("model", RECIPES)
def test_training_reaches_what_the_demo_promises(data: digits.Digits, model: str) -> None:
    recipe = RECIPES[model]
    untrained = digits.accuracy(recipe.make().eval(), data)
    taken: list[None] = []
    network = digits.train(recipe, data, lambda: taken.append(None))
    assert untrained < 0.3
    assert digits.accuracy(network, data) > 0.97
    assert len(taken) == digits.steps(recipe, data)
    assert not network.training


def test_training_is_seeded_and_leaves_the_random_state_alone(data: digits.Digits) -> None:
    few = digits.Digits(*(part[:128] for part in vars(data).values()))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first, second = (digits.train(RECIPES["digits-dbb"], few) for _ in range(2))
    assert torch.equal(torch.rand(3), wanted)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


@pytest.mark.parametrize("model", RECIPES)
def test_the_config_gives_the_network_that_was_trained(model: str) -> None:
    from service.networks import ModelConfig, build

    recipe = RECIPES[model]
    network = recipe.make().eval()
    state = network.state_dict()
    recognition = recognise(state, ModelConfig(**_tuples(recipe.config)))
    rebuilt = build(recognition, state)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(rebuilt(images), network(images))


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "input_shape": tuple(config["input_shape"])}


def test_checkpoints_are_saved_as_people_do(tmp_path: Path) -> None:
    network = digits.repvgg()
    files.save_checkpoint(network, tmp_path / "a.pth", "module.")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)
    assert set(saved) == {"state_dict", "epoch"}
    assert all(key.startswith("module.stage") or "linear" in key for key in saved["state_dict"])


def test_the_full_size_network_answers_differently_to_different_pictures() -> None:
    network = files.full_size_repvgg()
    assert sum(isinstance(module, Reparameterizable) for module in network.modules()) == 22
    variances = [m.running_var for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(float(v.std() / v.mean()) > 0.05 for v in variances if v is not None)
    with torch.inference_mode():
        logits = network(files._textures(4))
    assert float(logits.std(0).mean()) > 0.1 * float(logits.std())


def test_the_photograph_is_a_jpeg_with_something_on_it() -> None:
    picture = Image.open(io.BytesIO(files.photograph()))
    assert (picture.format, picture.size) == ("JPEG", (320, 240))
    assert np.asarray(picture).std() > 30


def test_a_service_that_cannot_start_is_a_clear_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catalog.sqlite3").write_text("not a database, and long enough to be read" * 50)
    console = Console(width=200)
    assert run(data_dir=tmp_path, console=console) == 1
    said = capsys.readouterr().out
    assert "The demo failed." in said
    assert "ended with status" in said


def test_the_service_ends_with_its_block(tmp_path: Path) -> None:
    with Service(tmp_path) as service:
        process = service._process
        assert process is not None
        assert process.poll() is None
        assert service.url.startswith("http://127.0.0.1:")
    assert process.poll() == 0


class _FakeClient:
    """Answers as a service whose deploy form is wrong on one image."""

    def __init__(self, labels: Any, wrong: int) -> None:
        self.logits = {"train": np.eye(10, dtype=np.float32)[labels]}
        self.logits["deploy"] = self.logits["train"].copy()
        self.logits["deploy"][:wrong] = np.roll(self.logits["deploy"][:wrong], 1, axis=1)
        self.sent = {"train": 0, "deploy": 0}

    def infer(self, model: str, rows: Any, form: str) -> Any:
        start = self.sent[form]
        self.sent[form] += len(rows)
        return self.logits[form][start : start + len(rows)]


@pytest.mark.parametrize("wrong", [0, 1])
def test_forms_that_disagree_on_one_image_fail_the_demo(
    data: digits.Digits, tmp_path: Path, wrong: int
) -> None:
    class _Version:
        model = "digits"

    client: Any = _FakeClient(data.test_labels.numpy(), wrong)
    out = Console(file=io.StringIO(), width=120)
    demo = _Demo(out, client, tmp_path)
    version: Any = _Version()
    if wrong:
        with pytest.raises(DemoFailed, match="disagree on 1 images"):
            demo._compare(version, data)
    else:
        demo._compare(version, data)
        assert client.sent == {"train": 450, "deploy": 450}


def test_a_saving_that_may_not_be_claimed_is_not_shown() -> None:
    batch = {
        "batch_size": 1,
        "train": {"median_ms": 2.0},
        "deploy": {"median_ms": 1.0},
        "speedup": 2.0,
        "speedup_interval": {"low": 1.9, "high": 2.1},
        "control": {"ratio": 1.001},
        "saving_percent": 50.0,
        "statement": "Batch 1: deploy is 2.00 times as fast.",
    }
    noisy = {**batch, "batch_size": 8, "saving_percent": None, "statement": "Batch 8: no claim."}
    facts = {"model": "m", "device": "cpu", "precision": "float32", "seconds": 20.0}
    out = Console(file=io.StringIO(), width=120)
    out.print(show.benchmark({**facts, "batches": [batch, noisy]}))
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "50 %" in text
    assert "no claim" in text
    assert "Batch 8: no claim." in text
