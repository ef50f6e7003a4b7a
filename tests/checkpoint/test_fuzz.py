"""Crafted and mutated files: no crash, no hang, no memory beyond the promise, nothing else touched.

`python -m tests.checkpoint.test_fuzz FIRST LAST` reads that range of mutants and prints figures.
"""

from __future__ import annotations

import collections
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.api.problems import catalogue
from tests.promises import Budget, Tell

from .corpus import crafted
from .mutate import mutant, seeds
from .readers import Outcome, Reader, snapshot
from .tricks import TRICKS

FAST_MUTANTS = 2_000
SOAK_MUTANTS = 100_000
PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the files lie; beside it is a file that nothing may touch."""
    inside = tmp_path_factory.mktemp("fuzz") / "inside"
    inside.mkdir()
    (inside.parent / "precious").write_text("precious")
    return inside


@pytest.fixture(scope="module")
def reader(folder: Path) -> Iterator[Reader]:
    with Reader(folder) as reader:
        yield reader


def test_every_crafted_file_is_refused_with_its_code(reader: Reader, folder: Path) -> None:
    """All crafted files, the tricks of the table first."""
    wrong, files = [], list(crafted())
    path = folder / "file"
    outside = snapshot(folder.parent).keys()
    for trick in files:
        trick.make(path)
        outcome = reader.read(path)
        faults = outcome.faults(path.stat().st_size)
        if outcome.code != trick.code or faults:
            wrong.append((trick.what, trick.code, outcome.code, faults))
        path.unlink()
    assert not wrong
    assert len(files) >= 200
    assert snapshot(folder.parent).keys() == outside
    assert (folder.parent / "precious").read_text() == "precious"


def test_every_code_is_documented() -> None:
    documented = {row["code"] for row in catalogue()}
    assert {trick.code for trick in TRICKS} <= documented
    assert len({trick.what for trick in TRICKS}) == len(TRICKS)


def test_the_seeds_are_honest(reader: Reader, folder: Path) -> None:
    """Undamaged, each is read; only nobody knows the network, and one is no checkpoint at all."""
    expected = {"bundle": "ok", "pt2": "ok", "pickle": "unsupported_container"}
    for name, data in seeds().items():
        path = folder / name
        path.write_bytes(data)
        assert reader.read(path).code == expected.get(name, "unknown_architecture"), name


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("planted-hog", "bytes of memory"),
        ("planted-crash", "ended with -11"),
        ("planted-error", "ZeroDivisionError"),
    ],
)
def test_a_planted_fault_is_seen(reader: Reader, folder: Path, planted: str, seen: str) -> None:
    """The control: the same measurement does find what it looks for."""
    (fault,) = reader.read(folder / planted).faults(file_bytes=1 << 20)
    assert seen in fault


def test_a_planted_hang_is_seen(folder: Path) -> None:
    with Reader(folder, wall_seconds=0.5) as impatient:
        assert impatient.read(folder / "planted-hang").faults(1) == ["crash: no answer"]


def test_mutated_files_do_no_harm(reader: Reader, folder: Path) -> None:
    figures = fuzz(range(FAST_MUTANTS), reader, folder)
    assert not figures.faults
    refused = FAST_MUTANTS - figures.codes["ok"] - figures.codes["unknown_architecture"]
    assert refused > FAST_MUTANTS // 2, "the mutations were too mild to prove anything"
    assert len(figures.codes) > 15, figures.codes


@pytest.mark.soak(share=0.15)
def test_a_hundred_thousand_mutated_files_do_no_harm(
    tmp_path: Path, budget: Budget, tell: Tell
) -> None:
    figures = fuzz_in_parallel(0, SOAK_MUTANTS, tmp_path, lambda: budget.left > 0)
    print(figures.table())
    tell(
        "mutated files through the reader",
        f"{SOAK_MUTANTS} with 0 crashes, <= 10 s each, <= 2 x file + 256 MB",
        f"{figures.count}, faults {len(figures.faults)}, most {figures.most_seconds:.2f} s and "
        f"{figures.most_bytes / 2**20:.0f} MiB",
        "a planted crash, hog, hang and error are seen",
    )
    assert not figures.faults
    assert figures.count >= SOAK_MUTANTS / 10, "the machine was too slow for most of them"


class Figures:
    """What a run of the fuzzer saw."""

    def __init__(self) -> None:
        self.codes: collections.Counter[str] = collections.Counter()
        self.faults: list[tuple[int, list[str]]] = []
        self.most_seconds, self.most_bytes = 0.0, 0

    @property
    def count(self) -> int:
        """How many files were read."""
        return sum(self.codes.values())

    def add(self, number: int, outcome: Outcome, file_bytes: int) -> None:
        self.codes[outcome.code.split(":")[0]] += 1
        if faults := outcome.faults(file_bytes):
            self.faults.append((number, faults))
        self.most_seconds = max(self.most_seconds, outcome.seconds)
        self.most_bytes = max(self.most_bytes, outcome.bytes)

    def join(self, other: Figures) -> None:
        self.codes += other.codes
        self.faults += other.faults
        self.most_seconds = max(self.most_seconds, other.most_seconds)
        self.most_bytes = max(self.most_bytes, other.most_bytes)

    def table(self) -> str:
        rows = [f"{count:8d} {code}" for code, count in self.codes.most_common()]
        rows.append(f"longest {self.most_seconds:.2f} s of CPU time for one file")
        rows.append(f"most memory added {self.most_bytes / 2**20:.1f} MiB")
        rows.append(f"faults: {self.faults or 'none'}")
        return "\n".join(rows)


def fuzz(numbers: Iterable[int], reader: Reader, folder: Path) -> Figures:
    """Read the mutants of these numbers. A fault can be had again by its number."""
    figures, files = Figures(), seeds()
    outside = snapshot(folder.parent).keys()
    path = folder / "mutant"
    for number in numbers:
        data = mutant(files, number)
        path.write_bytes(data)
        figures.add(number, reader.read(path), len(data))
    path.unlink(missing_ok=True)
    assert snapshot(folder.parent).keys() == outside
    return figures


def fuzz_in_parallel(
    first: int, last: int, folder: Path, wanted: Callable[[], bool] = lambda: True
) -> Figures:
    """The same in several processes, each with a folder of its own, while more is wanted."""

    def work(index: int) -> Figures:
        own = folder / str(index) / "inside"
        own.mkdir(parents=True)
        with Reader(own) as reader:
            numbers = range(first + index, last, PROCESSES)
            return fuzz(itertools.takewhile(lambda _: wanted(), numbers), reader, own)

    seeds()  # made once: exporting a program is nothing for two threads
    with ThreadPoolExecutor(PROCESSES) as pool:
        parts = list(pool.map(work, range(PROCESSES)))
    for part in parts[1:]:
        parts[0].join(part)
    return parts[0]


if __name__ == "__main__":
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        print(fuzz_in_parallel(int(sys.argv[1]), int(sys.argv[2]), Path(scratch)).table())
    print(f"{time.monotonic() - started:.0f} s")
