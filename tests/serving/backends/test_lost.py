"""A device that computes nothing any more is told from one that is full or reported an error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from service.serving.backends import find_lost, lost
from tests.forks import ROOT

STICKY = RuntimeError("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA")

_ASSERTION = """
import torch
from torch import nn

from service.graph import trace
from service.serving.backends import backend_named, find_lost

torch.manual_seed(0)
table = nn.Embedding(4, 3).eval()
program = trace(table, (torch.zeros(1, 2, dtype=torch.int64),))
prepared = backend_named("torch").prepare(program, "cuda:0", "float32", (1,))
list(prepared.warm())
rows = torch.tensor([[0, 3]])
assert torch.equal(prepared.run((rows,))[0], table(rows))
print("before:", find_lost("cuda:0"), flush=True)
try:
    torch.empty(1 << 46, device="cuda:0")
except torch.OutOfMemoryError:
    print("full:", find_lost("cuda:0"), flush=True)
answers = prepared.run((rows,))
try:
    prepared.run((torch.tensor([[0, 4]]),))
except RuntimeError:
    print("after:", find_lost("cuda:0"), "| the cpu:", find_lost("cpu"), flush=True)
del answers  # of before: whoever has them may let them go
print("alive: yes", flush=True)
from service.api.restart import leave

leave(0)
"""


def answers(monkeypatch: pytest.MonkeyPatch, *errors: Exception | None) -> list[Exception | None]:
    """Have the device answer so, one after the other; what it has not been asked for is left."""
    left = [*errors]

    def compute(device: torch.device) -> None:
        if (error := left.pop(0)) is not None:
            raise error

    monkeypatch.setattr(lost, "_compute", compute)
    return left


def test_an_error_that_stays_tells_that_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    left = answers(monkeypatch, STICKY, STICKY, None)
    found = find_lost("cuda:1")
    assert found is not None
    assert found.detail == "cuda:1: CUDA error: device-side assert triggered"
    assert found.extra == {"device": "cuda:1"}
    assert left == [None]


@pytest.mark.parametrize(
    "errors",
    [
        (None,),
        (STICKY, None),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),),
        (RuntimeError("CUDA error: out of memory"),),
    ],
)
def test_other_devices_are_not_lost(
    monkeypatch: pytest.MonkeyPatch, errors: tuple[Exception | None, ...]
) -> None:
    assert answers(monkeypatch, *errors) == [*errors]
    assert find_lost("cuda:0") is None


def test_a_cpu_is_not_even_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    left = answers(monkeypatch, STICKY)
    assert find_lost("cpu") is None
    assert left == [STICKY]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_failed_assertion_on_a_device_is_the_end_of_it() -> None:
    """In a process of its own, for that one cannot compute on the device afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", _ASSERTION], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert (said["before"], said["full"]) == ("None", "None")
    assert said["after"].startswith("cuda:0: CUDA error: device-side assert")
    assert said["after"].endswith("| the cpu: None")
    assert said["alive"] == "yes"
