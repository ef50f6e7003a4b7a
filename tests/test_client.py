from __future__ import annotations

import asyncio
import doctest
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from service import client as package
from service.client import AsyncClient, Client, model_name
from service.client import blocking as module
from service.demo.files import photograph, save_checkpoint
from service.errors import (
    BadInput,
    DeadlineExceeded,
    FoldserveError,
    ModelNotFound,
    NotACheckpoint,
    QueueFull,
)
from service.networks import RepVGG
from tests.api import tiny
from tests.running import RunningServer

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "client-net.pth"
    path.write_bytes(tiny.checkpoint())
    return path


def test_the_whole_way(server: RunningServer, checkpoint: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Client(server.url, timeout=120) as client:
        version = client.upload(
            checkpoint, config=tiny.CONFIG, progress=lambda sent, total: told.append((sent, total))
        )
        assert version.model == "client-net"
        size = checkpoint.stat().st_size
        assert told[-1] == (size, size)
        assert [sent for sent, _ in told] == sorted(sent for sent, _ in told)

        events = list(client.events(version))
        assert events[-1]["data"]["state"] == "ready"
        version = client.wait(version)
        assert version.final
        assert version.fusion is not None
        assert version.fusion["fused"] == 5

        rows = tiny.rows(3)
        truth = tiny.expected(rows)
        for form in ("deploy", "train"):
            found = client.infer(version.model, rows, form=form)
            assert np.abs(found - truth).max() < 1e-4 * np.abs(truth).max()
        labels = client.predict(version.model, rows, top_k=2)
        assert [[label.index for label in row] for row in labels] == np.argsort(-truth)[
            :, :2
        ].tolist()

        picture = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(16, 48).astype(np.uint8))
        path = tmp_path / "picture.png"
        picture.convert("RGB").save(path)
        from_path = client.predict(version.model, path)
        assert client.predict(version.model, path.read_bytes()) == from_path
        assert client.predict(version.model, picture.convert("RGB")) == from_path
        assert len(client.predict(version.model, [path, picture.convert("RGB")])) == 2

        assert version.model in [model["name"] for model in client.models()]
        assert [each.version for each in client.versions(version.model)] == [1]
        assert client.report(version.model, 1)["certificate"]["passed"]
        saved = client.download(version.model, 1, tmp_path / "back.pth", form="train")
        assert saved.read_bytes() == checkpoint.read_bytes()
        assert client.set_default(version.model, 1)["pinned"] is True
        assert client.health()["status"] == "ok"
        changed = client.change(
            version.model, 1, labels=[f"kind {n}" for n in range(len(truth[0]))]
        )
        assert changed.raw["config"]["labels"][0] == "kind 0"
        assert client.predict(version.model, rows)[0][0].label.startswith("kind ")
        client.delete(version.model)
        with pytest.raises(ModelNotFound, match="client-net"):
            client.model(version.model)


def test_the_documentation_runs(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = RepVGG([1, 1, 1, 1], [8, 8, 16, 32], num_classes=12)
    save_checkpoint(network, tmp_path / "RepVGG-A0-train.pth")
    (tmp_path / "cat.jpg").write_bytes(photograph())
    monkeypatch.chdir(tmp_path)
    options = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    examples = doctest.DocTestFinder(recurse=False).find(package, extraglobs={"url": server.url})
    runner = doctest.DocTestRunner(optionflags=options)
    results = [runner.run(example) for example in examples]
    with Client(server.url) as client:
        client.delete("repvgg-a0")
        client.delete("repvgg-a0-train")
    assert sum(result.attempted for result in results) >= 15
    assert sum(result.failed for result in results) == 0


def test_a_rejection_is_raised_as_itself(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "client-wrong.pth"
    path.write_text("no weights")
    with Client(server.url) as client, pytest.raises(NotACheckpoint) as caught:
        client.upload(path, wait=60)
    assert caught.value.remedy


def test_the_async_client_does_the_same(server: RunningServer, checkpoint: Path) -> None:
    async def walk() -> None:
        async with AsyncClient(server.url, timeout=120) as client:
            version = await client.upload(checkpoint, "client-async", config=tiny.CONFIG, wait=100)
            rows = tiny.rows(2)
            truth = tiny.expected(rows)
            several = await asyncio.gather(*(client.infer(version.model, rows) for _ in range(8)))
            for found in several:
                assert np.abs(found - truth).max() < 1e-4 * np.abs(truth).max()
            (first, _) = await client.predict(version.model, rows)
            assert first[0].index == truth[0].argmax()
            assert version.model in [model["name"] async for model in client.models()]
            assert [each.version async for each in client.versions(version.model)] == [1]
            events = [event async for event in client.events(version)]
            assert events[-1]["data"]["state"] == "ready"
            target = checkpoint.with_name("back.pth")
            await client.download(version.model, 1, target, form="train")
            assert target.read_bytes() == checkpoint.read_bytes()
            await client.delete(version.model)
            with pytest.raises(ModelNotFound):
                await client.model(version.model)

    asyncio.run(walk())


class Busy:
    """Answers busy some times, then well."""

    def __init__(self, times: int, status: int = 429) -> None:
        self.left, self.status, self.seen = times, status, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen += 1
        if self.left:
            self.left -= 1
            body = QueueFull("9 rows wait.").to_dict()
            return httpx.Response(self.status, json=body, headers={"Retry-After": "2"})
        return httpx.Response(200, json={"bytes": len(request.read())})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(module.time, "sleep", taken.append)
    return taken


@pytest.mark.parametrize("status", [429, 503])
def test_busy_is_repeated_after_the_time_asked_for(pauses: list[float], status: int) -> None:
    busy = Busy(2, status)
    with Client(transport=httpx.MockTransport(busy)) as client:
        client.health()
    assert (busy.seen, pauses) == (3, [2.0, 2.0])


def test_repetition_has_an_end(pauses: list[float]) -> None:
    busy = Busy(100)
    with Client(retries=3, transport=httpx.MockTransport(busy)) as client, pytest.raises(QueueFull):
        client.health()
    assert (busy.seen, len(pauses)) == (4, 3)


def test_other_refusals_are_not_repeated(pauses: list[float]) -> None:
    busy = Busy(1, 422)
    with Client(transport=httpx.MockTransport(busy)) as client, pytest.raises(QueueFull):
        client.health()
    assert (busy.seen, pauses) == (1, [])


def test_a_repeated_upload_sends_the_whole_file_again(
    pauses: list[float], checkpoint: Path
) -> None:
    sizes: list[int] = []
    busy = Busy(1)

    def handler(request: httpx.Request) -> httpx.Response:
        sizes.append(len(request.read()))
        answer = busy(request)
        if answer.is_success:
            names = ("checkpoint", "architecture", "fusion", "error")
            body = {"model": "m", "version": 1, "state": "queued"} | dict.fromkeys(names)
            return httpx.Response(202, json=body)
        return answer

    with Client(transport=httpx.MockTransport(handler)) as client:
        client.upload(checkpoint, "m")
    assert len(sizes) == 2
    assert sizes[0] == sizes[1] > checkpoint.stat().st_size


def test_a_wait_has_an_end(pauses: list[float]) -> None:
    names = ("checkpoint", "architecture", "fusion", "error")
    body = {"model": "m", "version": 1, "state": "queued"} | dict.fromkeys(names)

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=body)

    with (
        Client(transport=httpx.MockTransport(handler)) as client,
        pytest.raises(DeadlineExceeded, match="still queued"),
    ):
        client.wait(client.version("m", 1), seconds=0.01)


def test_an_answer_that_is_no_problem_is_told_by_its_status() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(502, text="<html>bad gateway</html>")

    with (
        Client(transport=httpx.MockTransport(handler)) as client,
        pytest.raises(FoldserveError, match="502"),
    ):
        client.health()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("RepVGG-A0-train.pth", "repvgg-a0-train"),
        ("/x/y/My Net.pth.tar", "my-net"),
        ("net.safetensors", "net"),
        ("_odd_.pt", "odd"),
        ("a" * 100 + ".pth", "a" * 63),
    ],
)
def test_models_are_named_after_files(path: str, name: str) -> None:
    assert model_name(path) == name


def test_a_file_without_a_name_is_refused() -> None:
    with pytest.raises(BadInput):
        model_name("___.pth")


def test_what_is_no_input_is_refused(server: RunningServer) -> None:
    with Client(server.url) as client, pytest.raises(BadInput, match="dict"):
        client.predict("m", {"a": 1})  # type: ignore[arg-type]
