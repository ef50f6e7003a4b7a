"""A device that fails: noticed, kept from the others, waited for, and loaded again."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from service.errors import BackendFailed, DeviceLost, ModelFaulty
from service.recovery import Recovery
from service.serving.batcher import Batcher
from service.serving.device import Device
from tests.serving.fakes import POISON, Doubler, rows


class Breaking(Doubler):
    """A program whose device can be lost."""

    lost: Exception | None = None

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.lost is not None:
            raise self.lost
        return super().run(inputs)


def test_a_lost_device_is_told_from_a_poison_request() -> None:
    async def scene() -> None:
        device = Device()
        prepared, neighbour = Breaking(), Batcher(Doubler(), device)
        batcher = Batcher(prepared, device)
        with pytest.raises(BackendFailed, match="poison"):
            await batcher.submit(rows(POISON))
        await batcher.submit(rows(1.0))
        assert batcher.fault is None, "a poison request is no fault of the program"
        prepared.lost = torch.OutOfMemoryError("CUDA out of memory")
        with pytest.raises(BackendFailed, match="out of memory"):
            await batcher.submit(rows(1.0))
        for _ in range(3):
            await neighbour.submit(rows(2.0))  # also waits until the diagnosis is made
        assert isinstance(batcher.fault, torch.OutOfMemoryError)
        with pytest.raises(ModelFaulty, match="out of memory") as refused:
            await batcher.submit(rows(1.0))
        assert refused.value.extra["retry_after"] > 0
        device.close()

    asyncio.run(scene())


def recovery(attempts: int = 3) -> tuple[Recovery, dict[tuple[str, int], Exception], list[float]]:
    """A recovery whose reload fails as long as there is an error for the version."""
    broken: dict[tuple[str, int], Exception] = {}
    tried: list[float] = []

    async def reload(key: tuple[str, int]) -> None:
        tried.append(time.monotonic())
        if key in broken:
            raise broken[key]

    made = Recovery(
        lambda: dict(broken), reload, check_seconds=0.02, attempts=attempts, longest_wait=0.2
    )
    return made, broken, tried


def test_a_fault_is_mended_with_growing_patience() -> None:
    async def scene() -> None:
        made, broken, tried = recovery()
        task = asyncio.create_task(made.run())
        made.check(("net", 1))
        broken["net", 1] = RuntimeError("CUDA error: an illegal memory access was encountered")
        while len(tried) < 5:
            await asyncio.sleep(0.01)
        assert not made.under_way, "after so many attempts readiness is not held back"
        with pytest.raises(ModelFaulty, match="illegal memory access"):
            made.check(("net", 1))
        made.check(("other", 1))
        broken.clear()
        while made.faults:
            await asyncio.sleep(0.01)
        task.cancel()
        gaps = [later - earlier for earlier, later in pairwise(tried)]
        assert gaps[3] > gaps[0]
        assert (made.seen, made.recovered) == (1, 1)
        made.check(("net", 1))

    asyncio.run(scene())


def test_what_is_deleted_is_not_mended() -> None:
    made, broken, _ = recovery()
    broken["net", 1] = RuntimeError("gone")
    made.note()
    assert made.under_way
    assert made.to_list()[0]["model"] == "net"
    made.forget("net", None)
    assert made.faults == {}


def test_nothing_is_mended_on_a_lost_device() -> None:
    async def scene() -> None:
        made, broken, tried = recovery()
        broken["net", 1] = DeviceLost("cuda:0: CUDA error", device="cuda:0")
        broken["other", 1] = RuntimeError("of another device")
        task = asyncio.create_task(made.run())
        while len(tried) < 4:
            await asyncio.sleep(0.01)
        del broken["other", 1]
        while len(made.faults) > 1:
            await asyncio.sleep(0.01)
        task.cancel()
        assert list(made.faults) == [("net", 1)]
        assert made.faults["net", 1].attempts == 0
        assert made.under_way, "readiness stays off, whatever the number of attempts"

    asyncio.run(scene())


def test_a_lost_device_takes_its_models_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ran nothing themselves too; another device's models go on."""
    breaking = Breaking()

    def find_lost(place: str) -> DeviceLost | None:
        sticky = breaking.lost is not None and "assert" in str(breaking.lost)
        return DeviceLost(f"{place}: {breaking.lost}", device=place) if sticky else None

    monkeypatch.setattr("service.serving.device.find_lost", find_lost)

    async def scene() -> None:
        gpu, cpu = Device("cuda:0", threads=1), Device("cpu", threads=1)
        prepared = Doubler()
        batcher, beside = Batcher(breaking, gpu), Batcher(prepared, gpu)
        elsewhere = Batcher(Doubler(), cpu)
        breaking.lost = RuntimeError("CUDA error: out of memory")
        with pytest.raises(BackendFailed):
            await batcher.submit(rows(1.0))
        await beside.submit(rows(1.0))
        assert gpu.lost is None, "the control: an error after which the device computes"

        breaking.lost = RuntimeError("CUDA error: device-side assert triggered")
        breaking.gate.clear()
        batcher = Batcher(breaking, gpu)
        asked = [asyncio.create_task(batcher.submit(rows(float(n)))) for n in range(4)]
        await asyncio.sleep(0.05)
        breaking.gate.set()
        failed = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, BackendFailed | ModelFaulty) for error in failed)
        assert any(isinstance(error, ModelFaulty) for error in failed), "those who came together"
        with pytest.raises(ModelFaulty, match="device-side assert") as refused:
            await beside.submit(rows(1.0))
        assert refused.value.code() == "model_faulty"
        assert refused.value.extra["retry_after"] > 0
        assert isinstance(beside.fault, DeviceLost)
        await elsewhere.submit(rows(1.0))
        assert elsewhere.fault is None

        await gpu.call(lambda: gpu.free(prepared, prepared.close))
        assert not prepared.closed, "freeing what a lost device held would abort the process"
        await cpu.call(lambda: cpu.free(prepared, prepared.close))
        assert prepared.closed
        gpu.close()
        cpu.close()

    asyncio.run(scene())
