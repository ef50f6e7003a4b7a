"""The engine benchmarks as commands, on the smallest work that is still all of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.arms import CONTROL, Arm, contention, measure


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_fuses_certifies_measures_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        f"engine --size 32 --batches 1,2 --seconds 0.6 --threads 1 --out {tmp_path}"
        " --backends torch,onnxruntime --precisions float32".split()
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "certificate passed" in printed
    data = json.loads((tmp_path / "engine.json").read_text())
    assert data["totals"]["convolutions_before"] == 44
    assert data["totals"]["convolutions_after"] == 22
    assert data["environment"]["threads"] == 1
    names = [
        "training form, eager module",
        "training form, torch float32",
        "deploy form, torch float32",
        "deploy form, onnxruntime float32",
    ]
    assert list(data["ways"]) == names
    assert [(row["batch"], row["arm"]) for row in data["measured"]] == [
        (size, name) for size in (1, 2) for name in (*names, CONTROL)
    ]
    assert all(row["seconds"]["p50"] > 0 for row in data["measured"])
    for line in (tmp_path / "engine.md").read_text().splitlines():
        assert line in printed


def test_shares_multiply_to_the_whole(tmp_path: Path) -> None:
    status = main(
        f"shares --size 32 --batches 2 --seconds 0.6 --threads 1 --out {tmp_path}".split()
    )
    assert status == 0
    lines = (tmp_path / "shares.md").read_text().splitlines()
    steps = [line.split("|")[2:5] for line in lines if line.count("|") == 5][2:]
    assert [step[0].strip() for step in steps][:4] == [
        "fusing",
        "engine",
        "threads",
        "precision bfloat16",
    ]
    product = 1.0
    for _, times, whole in steps[:4]:
        product *= float(times)
        assert product == pytest.approx(float(whole), rel=0.05)
    promised = [line for line in lines if "left alone" in line]
    assert [line.split(": ")[1].split()[0] for line in promised][:2] == ["float32", "bfloat16"]
    assert all("held |" in line or "open" in line for line in promised)


def test_a_control_that_differs_takes_the_claim_away() -> None:
    """The first way is slower each time, so its second turn in a round, the control, is too."""
    pause = iter(range(1, 10**6))
    first = Arm("first", lambda batch: time.sleep(0.003 * next(pause)))
    quick = Arm("quick", lambda batch: time.sleep(0.003))
    (rows,) = measure([first, quick], lambda n: (torch.zeros(n),), [1], 0.5)
    assert [row.arm for row in rows] == ["first", "quick", CONTROL]
    assert rows[0].speedup == 1
    assert rows[1].speedup > 1.5
    assert rows[0].control != 1
    assert not any(row.claim for row in rows)


def test_busy_processes_end_with_what_they_disturb() -> None:
    with contention(1, 30):
        pass
    with contention(0, 30):
        pass


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["turbo"]) == 2
    assert "engine" in capsys.readouterr().err
