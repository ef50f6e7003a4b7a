"""SIGKILL and power cuts at every step of upload, conversion, publish, deletion and switch.

Machines live through it side by side, for a service that starts or converts mostly waits. Before
each death something is asked of the service over HTTP; after the next start everything that was
acknowledged must be there, everything else must be wholly there or not at all, and what the death
left lying about must be gone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.store import BlobStore, Catalog, sqlite_url, verify
from tests.machines import small
from tests.machines.machine import Booted, Machine
from tests.promises import Budget, Tell
from tests.running import eventually

KILLS = 60
SOAK_KILLS = 1000
SIDE_BY_SIDE = 3
LEAST_RATE = 0.2  # deaths a second that even a busy machine plays
_MIGRATING = threading.Lock()  # Alembic keeps what it works on in a module


@dataclass
class Known:
    """What the client of one life after the other may rely on."""

    versions: dict[tuple[str, int], int] = field(default_factory=dict)  # -> number of the bundle
    ready: set[tuple[str, int]] = field(default_factory=set)
    defaults: dict[str, set[int | None]] = field(default_factory=dict)  # what may be the default
    unsure: set[tuple[str, int]] = field(default_factory=set)  # asked to go, not acknowledged
    deleted: set[tuple[str, int]] = field(default_factory=set)
    sent: int = 0


class Life:
    """A machine's story over many boots."""

    def __init__(self, box: Machine, name: str, change: str = "") -> None:
        self.box, self.change = box, change
        self.folder = box.disk / name
        self.folder.mkdir()
        self.known = Known()
        self.kills = self.cuts = self.struck = 0
        self.lives = 0
        self.data_dir = self.folder / "0"
        self.service: Booted | None = None

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """A client of the service that runs, booted if none does."""
        if self.service is None:
            self.box.faults.off()
            if self.data_dir.exists():
                self.box.sync(self.data_dir)
            self.box.faults.count()
            self.service = self.box.boot(self.data_dir, change=self.change)
        with self.service.client() as http:
            yield http

    def die(self, at: int, ask: Callable[[httpx.Client], None], *, cut: bool, after: bool) -> None:
        """Ask something of the service and kill it at the change `at` from now on."""
        with self.client() as http:
            assert self.service is not None
            self.box.faults.kill(self.service.pid, at, after=after)
            with suppress(httpx.TransportError):
                ask(http)
            self.struck += self.box.faults.struck
            self.service.kill()
        self.box.faults.off()
        self.service = None
        self.kills += 1
        if cut:
            self.cuts += 1
            self.lives += 1
            restored = self.folder / str(self.lives)
            self.box.cut_power(self.data_dir, restored)
            shutil.rmtree(self.data_dir)
            self.data_dir = restored

    def check(self) -> None:
        """Everything that was promised holds, in the service that runs and on its disk."""
        known = self.known
        with self.client() as http:
            states = _settled(http)
            for key, number in known.versions.items():
                if key in known.deleted:
                    assert key not in states, f"{key} was deleted and is back"
                    continue
                if key in known.unsure and key not in states:
                    known.deleted.add(key)
                    continue
                assert key in states, f"{key} was acknowledged and is lost"
                found = states[key]
                interrupted = (found["error"] or {}).get("code") == "conversion_interrupted"
                assert found["state"] == "ready" or interrupted, found
                if key in known.ready:
                    assert found["state"] == "ready", f"{key} was ready: {found}"
                expected = hashlib.sha256(small.bundle(number)).hexdigest()
                assert found["checkpoint"]["sha256"] == expected, f"{key} holds other bytes"
            known.unsure.clear()
            for model, possible in known.defaults.items():
                found = http.get(f"/v1/models/{model}").json()["default_version"]
                assert found in possible, f"{model} serves {found}, not one of {possible}"
                known.defaults[model] = {found}
                if found is not None:
                    number = known.versions[model, found]
                    assert small.answer(http, model) == pytest.approx(number + 1)
        self._check_disk(states)

    def _check_disk(self, states: dict[tuple[str, int], dict[str, Any]]) -> None:
        with _MIGRATING:
            catalog = Catalog(sqlite_url(self.data_dir / "catalog.sqlite3"))
        try:
            report = verify(catalog, BlobStore(self.data_dir / "blobs"))
            assert report.ok, report  # so that every blob holds the bytes that its name says
            assert not report.spoilt, report
            assert report.temporary_files == 0, report
            for model in {model for model, _ in states}:
                found = catalog.list_versions(model, limit=500).items
                assert all(version.attempts <= 2 for version in found)
        finally:
            catalog.close()
        scratch = self.data_dir / "scratch" / "conversions"
        (own,) = scratch.iterdir()
        # A conversion is published a moment before its files are removed.
        eventually(lambda: [path.name for path in own.iterdir()] == ["lock"], "files are removed")

    def end(self) -> None:
        """Let nothing of it run any more."""
        self.box.faults.off()
        if self.service is not None:
            self.service.kill()
            self.service = None

    @property
    def deletable(self) -> set[tuple[str, int]]:
        """The versions of `net`."""
        alive = self.known.versions.keys() - self.known.deleted
        return {key for key in alive if key[0] == "net"}

    # ---- what is asked --------------------------------------------------------------------

    def upload(self, http: httpx.Client, model: str = "net", *, wait: bool = False) -> None:
        """A new version; with `wait` it is acknowledged when it serves."""
        self.known.sent += 1
        number = self.known.sent
        response = small.upload(http, model, number, wait=wait)
        assert response.status_code in (201, 202), response.text
        key = (model, response.json()["version"])
        self.known.versions[key] = number
        if response.status_code == 201:
            self.known.ready.add(key)

    def switch(self, http: httpx.Client, model: str = "switched") -> None:
        """The other one of two versions becomes the default."""
        (now,) = self.known.defaults[model]
        other = 2 if now == 1 else 1
        self.known.defaults[model] = {now, other}
        response = http.put(f"/v1/models/{model}/default", json={"version": other})
        assert response.status_code == 200, response.text
        self.known.defaults[model] = {other}

    def delete(self, http: httpx.Client) -> None:
        """The oldest version of `net` goes."""
        key = min(self.deletable)
        self.known.unsure.add(key)
        response = http.delete(f"/v1/models/{key[0]}/versions/{key[1]}")
        assert response.status_code == 204, response.text
        self.known.unsure.discard(key)
        self.known.deleted.add(key)


def _settled(http: httpx.Client) -> dict[tuple[str, int], dict[str, Any]]:
    """Every version, once none waits or converts."""
    deadline = time.monotonic() + 60
    while True:
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for model in http.get("/v1/models", params={"limit": 500}).json()["items"]:
            url = f"/v1/models/{model['name']}/versions"
            for version in http.get(url, params={"limit": 500}).json()["items"]:
                found[model["name"], version["version"]] = version
        if all(each["state"] in ("ready", "rejected") for each in found.values()):
            return found
        assert time.monotonic() < deadline, "a conversion was never taken up again"
        time.sleep(0.03)


def _prepared(box: Machine, name: str, change: str = "") -> Life:
    """A life with two versions to switch between, and some to delete."""
    life = Life(box, name, change)
    with life.client() as http:
        for _ in range(2):
            life.upload(http, "switched", wait=True)
        response = http.put("/v1/models/switched/default", json={"version": 1})
        assert response.status_code == 200, response.text
        life.known.defaults["switched"] = {1}
        life.upload(http, "net", wait=True)
    life.check()
    return life


def _go_through(
    life: Life, kills: int, seed: int, wanted: Callable[[], bool] = lambda: True
) -> None:
    """Kill the service `kills` times, while wanted, spread over everything that can be asked.

    Beside each thing stands about how many changes the disk sees while it is done.
    """
    chance = random.Random(seed)
    asked = (
        (life.upload, 36),
        (lambda http: life.upload(http, wait=True), 170),
        (life.switch, 6),
        (lambda http: life.upload(http, wait=True), 170),
        (life.delete, 34),
    )
    for turn in itertools.takewhile(lambda _: wanted(), range(kills)):
        ask, changes = asked[turn % len(asked)]
        if ask == life.delete and not life.deletable:
            with life.client() as http:
                life.upload(http, wait=True)
        at = chance.randrange(1, changes + 1)
        life.die(at, ask, cut=chance.random() < 0.5, after=chance.random() < 0.5)
        life.check()


def _play(
    box: Machine, stories: int, kills: int, wanted: Callable[[], bool] = lambda: True
) -> Counter[str]:
    """Lives of `kills` deaths each, some side by side; what happened in all of them."""
    small.bundle(0)  # made before threads ask for it
    failed = threading.Event()

    def story(number: int) -> Counter[str]:
        if failed.is_set() or not wanted():
            return Counter()
        life = _prepared(box.beside(f"story-{stories}-{number}"), "crash")
        try:
            _go_through(life, kills, number, lambda: not failed.is_set() and wanted())
        except BaseException:
            failed.set()
            raise
        finally:
            life.end()
        shutil.rmtree(life.box.folder)
        counted = {"kills": life.kills, "in the middle": life.struck, "power cuts": life.cuts}
        return Counter(counted | {"deletions": len(life.known.deleted)})

    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return sum(pool.map(story, range(stories)), Counter[str]())


def test_nothing_acknowledged_is_lost_and_nothing_partial_is_seen(box: Machine) -> None:
    started = time.monotonic()
    counted = _play(box, SIDE_BY_SIDE, KILLS // SIDE_BY_SIDE)
    print(json.dumps(counted | {"seconds": round(time.monotonic() - started, 1)}))
    assert counted["kills"] == KILLS
    assert counted["in the middle"] > KILLS / 2, "most must come in the middle of something"
    assert counted["power cuts"] > KILLS / 5
    assert counted["deletions"] > 0


@pytest.mark.soak(share=0.45)
def test_a_thousand_deaths(box: Machine, budget: Budget, tell: Tell) -> None:
    """As many of the thousand as the time allows; each story begins on an empty disk."""
    started = time.monotonic()
    counted = _play(box, SOAK_KILLS // 50, 50, lambda: budget.left > 0)
    kills, seconds = counted["kills"], time.monotonic() - started
    tell(
        "SIGKILL and power cuts at random changes", f"{SOAK_KILLS} without a loss",
        f"{kills} without a loss, {counted['in the middle']} in the middle of something, "
        f"{counted['power cuts']} power cuts, {kills / seconds:.2f} a second",
        "a store that writes in place, and one that does not sync, are found out",
    )  # fmt: skip
    rate = kills / seconds
    assert kills == SOAK_KILLS or rate > LEAST_RATE, "the machine was too slow for most of them"


@pytest.mark.parametrize(("deaths", "state"), [(1, "ready"), (2, "rejected")])
def test_a_conversion_that_dies_twice_is_rejected(
    box: Machine, tmp_path: Path, deaths: int, state: str
) -> None:
    """Dying once, the control, costs nothing but time."""
    data_dir, ordered = box.disk / f"dies-{deaths}", tmp_path / "die"
    order = {"DIE_IN_CONVERSION": str(ordered)}
    box.faults.off()
    for _ in range(deaths):
        ordered.unlink(missing_ok=True)  # or it might die before it listens
        booted = box.boot(data_dir, order, change="tests.machines.broken:die_in_conversion")
        with booted.client() as http, suppress(httpx.TransportError):
            if not http.get("/v1/models").json()["items"]:
                small.upload(http, "net", 1)
            ordered.touch()
        booted.wait_gone()
    booted = box.boot(data_dir)
    with booted.client() as http:
        (found,) = _settled(http).values()
    booted.kill()
    assert (found["state"], found["version"]) == (state, 1)
    assert (found["error"] or {}).get("code") == (
        "conversion_interrupted" if state == "rejected" else None
    )


def test_a_store_that_writes_in_place_is_found_out(box: Machine) -> None:
    """A control: without the rename, some death leaves half a blob under a whole blob's name."""
    life = Life(box, "in-place", change="tests.machines.broken:publish_in_place")

    def die_in_uploads() -> None:
        for at in range(6, 16):
            life.die(at, life.upload, cut=False, after=False)
            life.check()

    with pytest.raises(AssertionError, match="StoreReport"):
        die_in_uploads()
    life.end()


def test_a_store_that_does_not_sync_is_found_out(box: Machine) -> None:
    """A control: without fsync, a power cut takes what was acknowledged."""
    life = Life(box, "unsynced")

    def lose_power() -> None:
        life.die(10_000, life.upload, cut=True, after=False)
        life.check()

    with life.client() as http:
        life.upload(http)
    life.check()
    box.faults.forget_syncs(True)
    try:
        with pytest.raises(AssertionError, match=r"is lost|did not start"):
            lose_power()
    finally:
        box.faults.forget_syncs(False)
    life.end()
