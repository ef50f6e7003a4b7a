"""The load and its checks, against servers that are known: one that does nothing, one that lies."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import peers
from benchmarks.load import Outcome, Plan, _quantile
from benchmarks.server import check
from benchmarks.server_report import Cell, Measured, render
from benchmarks.subjects import Process, Server, Unavailable, start_nothing
from benchmarks.workload import NETWORKS, Deployed, deploy_skeleton, samples

TINY = NETWORKS["tiny"]


@pytest.fixture
def nothing(tmp_path: Path) -> Iterator[Server]:
    with ExitStack() as stack:
        yield start_nothing(stack, tmp_path, samples(TINY))


def test_the_load_counts_what_was_answered(nothing: Server) -> None:
    outcome = nothing.measure("binary", 4, 0.5)
    assert outcome is not None
    assert outcome.failed == 0
    assert 0 < outcome.answered <= outcome.served
    assert 0 < outcome.p50 <= outcome.p99
    assert outcome.statuses == {"200": outcome.answered}
    assert outcome.rate == outcome.answered / 0.5


def test_the_load_says_when_nobody_listens() -> None:
    plan = Plan("127.0.0.1", 9, (b"GET / HTTP/1.1\r\n\r\n",), warm_seconds=0, seconds=0.2)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=plan.to_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    outcome = Outcome(**json.loads(done.stdout))
    assert outcome.answered == 0
    assert outcome.failed > 0


def test_a_server_that_lies_is_not_measured(nothing: Server, tmp_path: Path) -> None:
    (tmp_path / "network").write_text("tiny")
    state = deploy_skeleton(TINY.training_form()).state_dict()
    torch.save(state, tmp_path / "deploy.pth")
    reference = Deployed(tmp_path)
    nothing.name = "fastapi"  # it answers raw float32, all zero, in the right shape
    with pytest.raises(Unavailable, match="wrongly"):
        check(nothing, reference, samples(TINY))
    # The control: the answers of the network itself pass.
    given = samples(TINY)
    nothing.answers = lambda body: [  # type: ignore[method-assign]
        reference(reference.row(one.photo if body == "jpeg" else one.raw)[None]).tobytes()
        for one in given
    ]
    check(nothing, reference, given)


def test_a_process_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", "raise SystemExit('alas')"], tmp_path / "log", {})
    process.child.wait(30)
    with pytest.raises(Unavailable, match="alas"):
        process.check()


def test_every_encoding_of_a_peer_carries_the_row() -> None:
    (sample,) = samples(TINY, 1)
    for peer in peers.PEERS.values():
        request = peer.encode("binary", sample)
        assert request is not None
        assert sample.raw in request or base64.b64encode(sample.raw) in request
        as_json = peer.encode("json", sample)
        assert as_json is not None
        assert json.dumps(sample.nested).encode() in as_json


def test_binary_answers_of_the_protocol_are_cut_at_their_head() -> None:
    logits = np.frombuffer(b"]}}}" + bytes(36), np.float32)  # bytes that look like JSON
    head = json.dumps({"outputs": [{"name": "logits"}]}).encode()
    assert np.array_equal(peers.PEERS["triton"].decode(head + logits.tobytes()), logits)


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert _quantile(values, 0.5) == 50
    assert _quantile(values, 0.99) == 99
    assert _quantile([], 0.5) == 0.0


def test_the_report_compares_within_rounds() -> None:
    cell = Cell("binary", 8)

    def outcome(rate: float) -> Outcome:
        return Outcome(1.0, int(rate), 0, p50=0.01, p99=0.05, client_cpu=0.1)

    measured = [
        Measured(0, cell, "foldserve", outcome(200)),
        Measured(0, cell, "fastapi", outcome(100)),
        Measured(0, cell, "in-process", outcome(160)),
        Measured(1, cell, "foldserve", outcome(100)),
        Measured(1, cell, "fastapi", outcome(20)),
        Measured(1, cell, "in-process", outcome(160)),
    ]
    report = {
        "network": "tiny",
        "environment": {
            "cpu": "a CPU",
            "cpus": 2,
            "threads": 2,
            "python": "3",
            "load_average_before": 0.1,
            "when": "now",
            "seconds": 1,
            "versions": {},
        },
        "subjects": {"foldserve": "this", "fastapi": "that"},
        "missing": {"ray": "not installed"},
    }
    text = "\n".join(render(report, [cell], measured, ["foldserve", "fastapi", "in-process"]))
    assert "| fastapi | 60.0 (20.0 to 100.0) | 3.50 (2.00 to 5.00) |" in text
    assert "**not measured**: not installed" in text
    assert "queue depth): 1.00 (1.00 to 1.00)" in text
    assert "## Promises" in text
    assert "| tiny, binary, concurrency 8: requests a second over fastapi: more than 1 |" in text
