"""Hostile files and dying conversions over real HTTP: refused, rejected, nothing left."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import processes
from tests.api import tiny
from tests.api.problem import problem
from tests.checkpoint.corpus import crafted
from tests.checkpoint.mutate import mutant, seeds
from tests.checkpoint.readers import snapshot
from tests.processes import Held
from tests.promises import Budget, Tell
from tests.running import RunningServer, running

CONVERSION_SECONDS = 8.0
_MIB = 1 << 20


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A service that gives conversions little time, in a folder beside which nothing may appear."""
    folder = tmp_path_factory.mktemp("hostile") / "service"
    folder.mkdir()
    limits = {
        "FOLDSERVE_CONVERSION_SECONDS": str(CONVERSION_SECONDS),
        "FOLDSERVE_MAX_ACTIVATION_BYTES": str(4 * _MIB),
    }
    with running(folder / "data", limits) as server:
        yield server


@pytest.fixture
def own(own_server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own_server.url, timeout=120) as client:
        yield client


def upload(http: httpx.Client, model: str, data: bytes, *, wait: bool = True) -> httpx.Response:
    return http.post(
        f"/v1/models/{model}/versions",
        files={"checkpoint": ("net.pth", data)},
        data={"config": json.dumps(tiny.CONFIG)},
        headers={"Prefer": "wait=100"} if wait else {},
    )


def final(http: httpx.Client, location: str) -> dict[str, Any]:
    """The version's resource once its state is final."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        version: dict[str, Any] = http.get(location).json()
        if version["state"] in ("ready", "rejected"):
            return version
        time.sleep(0.02)
    raise AssertionError(f"{location} is still {version['state']}")


def send_files(
    server: RunningServer, http: httpx.Client, files: Iterable[tuple[str, bytes, str | None]]
) -> int:
    """Upload each, check the answer, and see that only the store has grown."""
    outside = server.data_dir.parent.parent
    own = str(server.data_dir)
    before = {path for path in snapshot(outside) if not path.startswith(own)}
    count = 0
    for name, data, code in files:
        count += 1
        started = time.monotonic()
        answer = upload(http, "hostile", data)
        assert answer.status_code in (201, 422), f"{name}: {answer.status_code} {answer.text}"
        if code is not None:
            problem(answer, 422, code)
        if answer.status_code == 422:
            found = answer.json()["code"]
            assert not found.startswith("conversion_"), f"{name}: {answer.text}"
        assert time.monotonic() - started < 60, name
    assert {path for path in snapshot(outside) if not path.startswith(own)} == before
    assert not list((server.data_dir / "scratch").rglob("*.*"))
    assert http.get("/health").json()["status"] == "ok"
    return count


def crafted_files(folder: Path, step: int) -> Iterator[tuple[str, bytes, str | None]]:
    for trick in list(crafted())[::step]:
        path = folder / "file"
        trick.make(path)
        yield trick.what, path.read_bytes(), trick.code
        path.unlink()


def test_crafted_and_mutated_files_over_http(
    own_server: RunningServer, own: httpx.Client, tmp_path: Path
) -> None:
    assert send_files(own_server, own, crafted_files(tmp_path, 30)) >= 10
    mutants = ((f"mutant {n}", mutant(seeds(), n), None) for n in range(10))
    assert send_files(own_server, own, mutants) == 10


@pytest.mark.soak(share=0.06)
def test_all_crafted_and_many_mutated_files_over_http(
    own_server: RunningServer, own: httpx.Client, tmp_path: Path, budget: Budget, tell: Tell
) -> None:
    known = send_files(own_server, own, crafted_files(tmp_path, 1))
    numbers = itertools.takewhile(lambda _: budget.left > 0, range(1_000))
    mutants = ((f"mutant {n}", mutant(seeds(), n), None) for n in numbers)
    others = send_files(own_server, own, mutants)
    tell(
        "hostile files over HTTP", "200 crafted, more while time is left: no 5xx, nothing touched",
        f"{known} crafted, {others} mutated", "a planted crash is seen (test_fuzz)",
    )  # fmt: skip
    assert known >= 200
    assert others >= 100, "the machine was too slow for most of them"


@pytest.mark.parametrize("name", ["..", "a%2Fb", "a%5Cb", "a%00b", "a%E2%80%AEb", "A", "a b"])
def test_model_names_lead_nowhere(own: httpx.Client, name: str) -> None:
    answer = own.post(f"/v1/models/{name}/versions", content=b"x")
    assert answer.status_code in (404, 405, 422), answer.text
    if answer.status_code == 422:
        assert answer.json()["code"] == "name_invalid"


@pytest.mark.parametrize("label", ["a\0b", "a\u202eb", "a\nb", "\u2066a"])
def test_labels_cannot_mislead(own: httpx.Client, label: str) -> None:
    config = json.dumps({"labels": ["ok", label]})
    answer = own.post("/v1/models/labels/versions", params={"config": config}, content=b"x")
    assert "labels.1" in problem(answer, 422, "unsafe_label")["detail"]


def test_a_network_that_would_take_the_services_memory_is_not_loaded(own: httpx.Client) -> None:
    """Converted in its own process with three samples; here it would run with 32."""
    config = json.dumps({"input_shape": [3, 512, 512]})
    answer = own.post(
        "/v1/models/large/versions",
        params={"config": config},
        content=tiny.checkpoint(),
        headers={"Prefer": "wait=100"},
    )
    assert "max_activation_bytes" in problem(answer, 422, "limit_exceeded")["detail"]
    assert upload(own, "small", tiny.checkpoint()).status_code == 201


def kill_conversions(server: RunningServer, http: httpx.Client, times: int, seed: int) -> set[str]:
    """End conversions at random moments; returns the stages in which they were."""
    chance, data = random.Random(seed), tiny.checkpoint()
    pid = server.process.pid
    started = time.monotonic()
    honest = upload(http, "honest", data)
    assert honest.status_code == 201, honest.text
    longest = time.monotonic() - started
    killed, stages, tries = 0, set(), 0
    while killed < times:
        tries += 1
        assert tries < 4 * times, "the conversions were over before they could be ended"
        number = signal.SIGSTOP if killed % 8 == 1 else signal.SIGKILL
        location = upload(http, "killed", data, wait=False).headers["location"]
        until = time.monotonic() + 60
        while (child := processes.conversion(pid)) is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.8 * longest))
        if child is None or child != processes.conversion(pid):
            final(http, location)
            continue
        try:
            os.kill(child, number)
        except ProcessLookupError:
            final(http, location)
            continue
        version = final(http, location)
        if version["state"] == "ready":  # it had said its result already
            continue
        killed += 1
        stages.add((version["progress"] or {}).get("stage", "start"))
        assert version["state"] == "rejected"
        error = version["error"]
        if number == signal.SIGSTOP:
            assert (error["code"], error["status"]) == ("conversion_timeout", 422)
            assert "8 s" in error["detail"]
        else:
            assert (error["code"], error["status"]) == ("conversion_crashed", 422)
            assert "SIGKILL" in error["detail"]
        assert error["remedy"]
    return stages


def grown(now: Held, before: Held) -> int:
    """By how many descriptors or threads a service has grown, whichever is more."""
    return max(now.descriptors - before.descriptors, now.threads - before.threads)


def settled(pid: int, like: Held) -> Held:
    """What the service holds, once it is as before or has had a while to come back to it."""
    deadline = time.monotonic() + 10
    while True:
        now = Held.by(pid)
        same = grown(now, like) <= 0 and now.processes == like.processes
        if same or time.monotonic() > deadline:
            return now
        time.sleep(0.1)


def fill_pools(http: httpx.Client) -> None:
    """Ask so much at once that every thread and connection that a pool may hold is there."""
    with ThreadPoolExecutor(16) as callers:
        list(callers.map(lambda _: http.get("/v1/models").raise_for_status(), range(200)))


def check_kills(server: RunningServer, http: httpx.Client, times: int) -> None:
    pid = server.process.pid
    kill_conversions(server, http, 1, seed=1)
    fill_pools(http)
    before = Held.by(pid)
    kill_conversions(server, http, times, seed=2)
    after = settled(pid, before)
    assert grown(after, before) <= 0
    assert after.processes == before.processes
    assert after.memory < before.memory + 16 * _MIB
    # A worker's own folder stays; those of its conversions go.
    workers = (server.data_dir / "scratch" / "conversions").iterdir()
    assert not [folder for worker in workers for folder in worker.iterdir() if folder.is_dir()]
    assert upload(http, "honest", tiny.checkpoint(1)).status_code == 201


def test_conversions_killed_at_any_moment_are_rejected_and_leave_nothing(
    own_server: RunningServer, own: httpx.Client
) -> None:
    check_kills(own_server, own, 5)


@pytest.mark.soak(share=0.06)
def test_many_conversions_killed_at_any_moment(
    own_server: RunningServer, own: httpx.Client, budget: Budget, tell: Tell
) -> None:
    kills = 0
    while budget.left > 0 and kills < 80:
        check_kills(own_server, own, 8)
        kills += 8
    tell(
        "conversions killed at random moments", "all rejected with a reason, nothing left",
        f"{kills} killed", "a descriptor that is kept is seen",
    )  # fmt: skip
    assert kills >= 24, "the machine was too slow for most of them"


def test_a_descriptor_that_is_kept_is_seen(own_server: RunningServer) -> None:
    """The control: what a process holds is counted as it is."""
    before = Held.by(os.getpid())
    with open("/dev/null"):
        assert Held.by(os.getpid()).descriptors == before.descriptors + 1
