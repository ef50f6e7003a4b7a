"""The engine benchmark as a command, on the smallest work that is still all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_fuses_certifies_measures_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engine.json"
    status = main(
        f"engine --size 32 --batches 1,2 --seconds 0.6 --threads 1 --json {out}"
        " --backends torch".split()
    )
    assert status == 0
    printed = capsys.readouterr().out
    assert "certificate passed" in printed
    assert "training form, torch float32 -> deploy form, torch float32" in printed
    data = json.loads(out.read_text())
    assert data["totals"]["convolutions_before"] == 44
    assert data["totals"]["convolutions_after"] == 22
    for comparison in data["comparisons"]:
        assert [batch["batch_size"] for batch in comparison["batches"]] == [1, 2]
        assert all(batch["baseline"]["p50"] > 0 for batch in comparison["batches"])
        assert comparison["environment"]["torch_threads"] == 1


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["turbo"]) == 2
    assert "known: engine" in capsys.readouterr().err
