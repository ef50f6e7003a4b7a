"""The set of loaded models: flips, failures, lazy training forms, and serving all the while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Mapping

import numpy as np
import pytest
import torch
from torch import nn

from service.errors import BackendFailed, BadInput, FormNotAvailable, NotLoaded
from service.graph import Program, trace
from service.serving import Form, LoadOptions, ModelSet, ModelSetLimits, Prepared, Result

CPU = LoadOptions(device="cpu", max_batch=4)
ROW = np.ones((1, 3), np.float32)


class Scale(nn.Module):
    """Multiplies by a known factor, so that an answer says which program gave it."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((3,), factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.fixture(scope="module")
def programs() -> list[Program]:
    """Programs 0 … 3; program i multiplies by i + 1."""
    return [trace(Scale(i + 1.0).eval(), (torch.zeros(1, 3),)) for i in range(4)]


class Reader:
    """Gives a program, slowly if asked, and counts how often."""

    def __init__(self, program: Program, seconds: float = 0.0, failures: int = 0) -> None:
        self.calls = 0
        self._program = program
        self._seconds = seconds
        self._failures = failures

    def __call__(self) -> Program:
        self.calls += 1
        time.sleep(self._seconds)
        if self.calls <= self._failures:
            raise OSError("the disk said no")
        return self._program


def _factor(result: Result) -> float:
    (output,) = result.outputs
    assert (output == output[0, 0]).all()
    return float(output[0, 0])


def test_a_loaded_version_answers_and_is_described(programs: list[Program]) -> None:
    async def scenario() -> None:
        models = ModelSet(ModelSetLimits(threads=1))
        loaded = await models.load("m", 1, {"deploy": lambda: programs[1]}, CPU)
        assert loaded.description.batch_sizes == (1, 2, 4)
        assert loaded.description.threads == 1
        assert loaded.load_seconds > 0
        assert _factor(await models.predict("m", ROW)) == 2
        assert _factor(await models.predict("m", ROW, version=1)) == 2
        assert models.weight_bytes == 12
        assert models.loaded()[0].stats.answered == 2
        prepared = await models.prepared("m")
        assert [spec.shape for spec in prepared.inputs] == [(3,)]
        await models.close()
        assert models.loaded() == ()

    asyncio.run(scenario())


def test_what_is_not_loaded_is_said_to_be_so(programs: list[Program]) -> None:
    async def scenario() -> None:
        models = ModelSet()
        with pytest.raises(NotLoaded):
            await models.predict("m", ROW)
        await models.load("m", 1, {"deploy": lambda: programs[0]}, CPU)
        with pytest.raises(NotLoaded):
            await models.predict("m", ROW, version=2)
        with pytest.raises(NotLoaded):
            models.activate("m", 2)
        with pytest.raises(FormNotAvailable):
            await models.predict("m", ROW, form="train")
        with pytest.raises(BadInput):
            await models.predict("m", ROW[:, :2])
        await models.unload("unknown")
        await models.close()
        with pytest.raises(NotLoaded):
            await models.predict("m", ROW)

    asyncio.run(scenario())


def test_the_first_version_serves_until_another_is_activated(programs: list[Program]) -> None:
    async def scenario() -> None:
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[0]}, CPU)
        await models.load("m", 2, {"deploy": lambda: programs[1]}, CPU)
        assert models.active("m") == 1
        assert _factor(await models.predict("m", ROW)) == 1
        models.activate("m", 2)
        assert _factor(await models.predict("m", ROW)) == 2
        assert _factor(await models.predict("m", ROW, version=1)) == 1
        await models.unload("m", 2)
        assert models.active("m") is None
        with pytest.raises(NotLoaded):
            await models.predict("m", ROW)
        assert _factor(await models.predict("m", ROW, version=1)) == 1
        await models.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("options", "failures", "error"),
    [
        (CPU, 1, OSError),
        (LoadOptions(device="cpu", backend="abacus"), 0, BackendFailed),
        (LoadOptions(device="cpu", precision="float16"), 0, BackendFailed),
    ],
)
def test_a_load_that_fails_leaves_everything_as_it_was(
    programs: list[Program], options: LoadOptions, failures: int, error: type[Exception]
) -> None:
    async def scenario() -> None:
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[0]}, CPU)
        with pytest.raises(error):
            await models.load("m", 1, {"deploy": Reader(programs[1], failures=failures)}, options)
        with pytest.raises(error):
            await models.load("m", 2, {"deploy": Reader(programs[1], failures=failures)}, options)
        assert _factor(await models.predict("m", ROW)) == 1
        assert [loaded.key.version for loaded in models.loaded()] == [1]
        await models.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("swaps", [40, pytest.param(200, marks=pytest.mark.soak(share=0.015))])
def test_hot_swaps_under_load_fail_nobody(programs: list[Program], swaps: int) -> None:
    async def scenario() -> None:
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[0]}, CPU)
        stop = asyncio.Event()
        seen: list[float] = []

        async def client() -> None:
            while not stop.is_set():
                seen.append(_factor(await models.predict("m", ROW)))

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for swap in range(swaps):
            program = programs[swap % 4]
            version = 1 + swap % 2
            await models.load("m", version, {"deploy": lambda program=program: program}, CPU)
            models.activate("m", version)
            assert _factor(await models.predict("m", ROW)) == swap % 4 + 1  # at once the new one
        stop.set()
        await asyncio.gather(*clients)
        assert set(seen) == {1.0, 2.0, 3.0, 4.0}
        assert len(seen) > 100
        await models.close()

    asyncio.run(scenario())


def test_the_training_form_is_loaded_on_first_use_once(programs: list[Program]) -> None:
    async def scenario() -> None:
        train = Reader(programs[2], seconds=0.1)
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[0], "train": train}, CPU)
        assert train.calls == 0
        leaver = asyncio.create_task(models.predict("m", ROW, form="train"))
        others = [asyncio.create_task(models.predict("m", ROW, form="train")) for _ in range(5)]
        await asyncio.sleep(0.02)
        leaver.cancel()
        assert _factor(await models.predict("m", ROW)) == 1  # while it loads
        assert [_factor(await other) for other in others] == [3.0] * 5
        assert train.calls == 1
        with pytest.raises(asyncio.CancelledError):
            await leaver
        await models.close()

    asyncio.run(scenario())


def test_a_training_form_that_fails_to_load_is_tried_again(programs: list[Program]) -> None:
    async def scenario() -> None:
        train = Reader(programs[2], failures=1)
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[0], "train": train}, CPU)
        with pytest.raises(OSError, match="the disk said no"):
            await models.predict("m", ROW, form="train")
        assert _factor(await models.predict("m", ROW, form="train")) == 3
        await models.close()

    asyncio.run(scenario())


def test_an_idle_training_form_is_unloaded_and_comes_back(programs: list[Program]) -> None:
    async def scenario() -> None:
        train = Reader(programs[2])
        models = ModelSet(ModelSetLimits(train_idle_seconds=0.1))
        await models.load("m", 1, {"deploy": lambda: programs[0], "train": train}, CPU)
        await models.predict("m", ROW, form="train")
        assert len(models.loaded()) == 2
        await asyncio.sleep(0.4)
        assert [loaded.key.form for loaded in models.loaded()] == ["deploy"]
        assert _factor(await models.predict("m", ROW, form="train")) == 3
        assert train.calls == 2
        await models.close()

    asyncio.run(scenario())


def test_unloading_during_a_lazy_load_wins(programs: list[Program]) -> None:
    async def scenario() -> None:
        models = ModelSet()
        train = Reader(programs[2], seconds=0.1)
        await models.load("m", 1, {"deploy": lambda: programs[0], "train": train}, CPU)
        asked = asyncio.create_task(models.predict("m", ROW, form="train"))
        await asyncio.sleep(0.02)
        await models.unload("m")
        with pytest.raises(NotLoaded):
            await asked
        assert models.loaded() == ()
        await models.close()

    asyncio.run(scenario())


def _work(
    log: list[str], steps: int = 5
) -> Callable[[Mapping[Form, Prepared]], Generator[None, None, str]]:
    def work(prepared: Mapping[Form, Prepared]) -> Generator[None, None, str]:
        for _ in range(steps):
            time.sleep(0.02)
            prepared["train"].run((torch.ones(1, 3),))
            log.append("step")
            yield
        return ",".join(sorted(prepared))

    return work


def test_work_on_the_device_lets_requests_in_between_its_steps(programs: list[Program]) -> None:
    async def scenario() -> None:
        log: list[str] = []
        models = ModelSet(ModelSetLimits(train_idle_seconds=0.0))
        read = {"deploy": lambda: programs[0], "train": lambda: programs[2]}
        await models.load("m", 1, read, CPU)  # type: ignore[arg-type]
        working = asyncio.create_task(models.on_device("m", None, ("train", "deploy"), _work(log)))
        await asyncio.sleep(0.03)
        await models.sweep()  # the idle limit is 0, but it is in use
        for _ in range(3):
            await models.predict("m", ROW)
            log.append("request")
        assert await working == "deploy,train"
        assert log.count("step") == 5
        assert "request" in log[log.index("step") : -1]
        await models.sweep()
        assert [loaded.key.form for loaded in models.loaded()] == ["deploy"]
        await models.close()

    asyncio.run(scenario())


def test_an_error_in_work_on_the_device_comes_back(programs: list[Program]) -> None:
    def work(prepared: Mapping[Form, Prepared]) -> Generator[None, None, None]:
        yield
        raise ArithmeticError("no")

    async def scenario() -> None:
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[0]}, CPU)
        with pytest.raises(ArithmeticError):
            await models.on_device("m", 1, ("deploy",), work)
        assert _factor(await models.predict("m", ROW)) == 1
        await models.close()

    asyncio.run(scenario())


def test_closing_answers_what_waits(programs: list[Program]) -> None:
    async def scenario() -> None:
        models = ModelSet()
        await models.load("m", 1, {"deploy": lambda: programs[3]}, CPU)
        tasks = [asyncio.create_task(models.predict("m", ROW)) for _ in range(20)]
        await asyncio.sleep(0)
        await models.close()
        assert [_factor(task.result()) for task in tasks] == [4.0] * 20

    asyncio.run(scenario())
