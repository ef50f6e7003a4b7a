"""The batcher: whose rows, in which order, in which batch, and what happens when it fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from service.errors import BackendFailed, BadInput, DeadlineExceeded, NotLoaded, QueueFull
from service.serving import Batcher, BatchLimits, Device, Prepared, Result, backend_named

from . import pair
from .fakes import POISON, Doubler, is_own, rows


@pytest.fixture
def device() -> Iterator[Device]:
    thread = Device("cpu", threads=1)
    yield thread
    thread.close()


async def _held(batcher: Batcher, fake: Doubler) -> asyncio.Task[Result]:
    """Occupy the device with the row 100, so that what follows becomes backlog."""
    fake.gate.clear()
    fake.started.clear()
    task = asyncio.create_task(batcher.submit(rows(100)))
    await asyncio.to_thread(fake.started.wait, 5)
    return task


async def _settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_lone_request_runs_at_once_and_alone(device: Device) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        started = time.monotonic()
        result = await batcher.submit(rows(1, 2))
        assert time.monotonic() - started < 0.5
        assert is_own(result, (1, 2))
        assert result.timing.batch_rows == 2
        assert result.timing.batches == 1
        assert 0 <= result.timing.queue_seconds < 0.5
        await batcher.close()

    asyncio.run(scenario())
    assert fake.threads == {"device cpu"}


def test_what_waits_is_the_next_batch_in_order_of_arrival(device: Device) -> None:
    fake = Doubler(largest=4)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        tasks = [asyncio.create_task(batcher.submit(rows(value))) for value in range(10)]
        await _settle()
        assert batcher.stats().waiting_rows == 10
        fake.gate.set()
        results = await asyncio.gather(first, *tasks)
        assert fake.runs == [[100], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert all(is_own(result, (value,)) for value, result in enumerate(results[1:]))
        assert [result.timing.batch_rows for result in results] == [1] + [4] * 8 + [2] * 2
        stats = batcher.stats()
        assert (stats.answered, stats.rows, stats.batches, stats.waiting_rows) == (11, 11, 4, 0)
        assert stats.batch_rows == {1: 1, 4: 2, 2: 1}
        await batcher.close()

    asyncio.run(scenario())


def test_more_rows_than_a_batch_are_split_and_joined_and_nobody_is_mixed_up(
    device: Device,
) -> None:
    fake = Doubler(largest=4)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        small = asyncio.create_task(batcher.submit(rows(1, 2)))
        await _settle()
        large = asyncio.create_task(batcher.submit(rows(*range(10, 19))))
        await _settle()
        last = asyncio.create_task(batcher.submit(rows(3)))
        await _settle()
        fake.gate.set()
        await first
        assert is_own(await small, (1, 2))
        assert is_own(await large, tuple(range(10, 19)))
        assert is_own(await last, (3,))
        assert fake.runs[1:] == [[1, 2, 10, 11], [12, 13, 14, 15], [16, 17, 18, 3]]
        assert (await large).timing.batches == 3
        await batcher.close()

    asyncio.run(scenario())


def test_a_full_queue_refuses_and_says_when_to_come_back(device: Device) -> None:
    fake = Doubler(largest=2, pause=lambda: 0.01)

    async def scenario() -> None:
        batcher = Batcher(fake, device, BatchLimits(queue_rows=4))
        for _ in range(5):
            await batcher.submit(rows(1))  # the rate is learnt here
        first = await _held(batcher, fake)
        tasks = [asyncio.create_task(batcher.submit(rows(value, value))) for value in (1, 2)]
        await _settle()
        with pytest.raises(QueueFull) as refused:
            await batcher.submit(rows(3))
        assert 0.005 < refused.value.extra["retry_after"] < 0.5
        fake.gate.set()
        await asyncio.gather(first, *tasks)
        assert is_own(await batcher.submit(rows(3)), (3,))  # and there is room again
        assert batcher.stats().rejected == 1
        await batcher.close()

    asyncio.run(scenario())


def test_a_request_that_could_never_wait_is_bad_input_not_queue_full(device: Device) -> None:
    async def scenario() -> None:
        batcher = Batcher(Doubler(largest=2), device, BatchLimits(queue_rows=4))
        with pytest.raises(BadInput, match="at most 4"):
            await batcher.submit(rows(*range(5)))
        assert is_own(await batcher.submit(rows(*range(4))), (0, 1, 2, 3))
        await batcher.close()

    asyncio.run(scenario())


def test_a_deadline_ends_waiting_but_not_computing(device: Device) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        fake.gate.clear()
        running = asyncio.create_task(batcher.submit(rows(7), deadline=time.monotonic() + 0.03))
        await asyncio.to_thread(fake.started.wait, 5)
        late = asyncio.create_task(batcher.submit(rows(8), deadline=time.monotonic() + 0.03))
        patient = asyncio.create_task(batcher.submit(rows(9)))
        with pytest.raises(DeadlineExceeded):  # told at once, with the device still held up
            await late
        fake.gate.set()
        assert is_own(await running, (7,))
        assert is_own(await patient, (9,))
        assert fake.runs == [[7], [9]]
        assert batcher.stats().expired == 1
        await batcher.close()

    asyncio.run(scenario())


def test_a_deadline_that_has_passed_is_dropped_at_assembly(device: Device) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        late = asyncio.create_task(batcher.submit(rows(8), deadline=time.monotonic() + 0.01))
        await _settle()
        time.sleep(0.05)  # the loop is held up too, so its timer cannot fire first
        fake.gate.set()
        time.sleep(0.05)
        with pytest.raises(DeadlineExceeded):
            await late
        await first
        assert fake.runs == [[100]]
        assert batcher.stats().waiting_rows == 0
        await batcher.close()

    asyncio.run(scenario())


def test_departed_clients_do_not_compute_and_free_their_room(device: Device) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device, BatchLimits(queue_rows=3))
        first = await _held(batcher, fake)
        tasks = [asyncio.create_task(batcher.submit(rows(value))) for value in (1, 2, 3)]
        await _settle()
        tasks[1].cancel()
        await _settle()
        assert batcher.stats().waiting_rows == 2
        taken_its_place = asyncio.create_task(batcher.submit(rows(4)))
        await _settle()
        fake.gate.set()
        assert is_own(await tasks[0], (1,))
        assert is_own(await tasks[2], (3,))
        assert is_own(await taken_its_place, (4,))
        await first
        assert fake.runs == [[100], [1, 3, 4]]
        assert batcher.stats().departed == 1
        await batcher.close()

    asyncio.run(scenario())


def test_only_the_culprit_of_a_failed_batch_fails(device: Device) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        values = (1.0, POISON, 2.0)
        tasks = [asyncio.create_task(batcher.submit(rows(value))) for value in values]
        await _settle()
        fake.gate.set()
        good, bad, also_good = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(bad, BackendFailed)
        assert "ValueError: poison" in bad.detail
        assert isinstance(good, Result)
        assert isinstance(also_good, Result)
        assert is_own(good, (1,))
        assert is_own(also_good, (2,))
        await first
        stats = batcher.stats()
        assert (stats.answered, stats.failed, stats.retried) == (3, 1, 3)
        assert fake.runs[:5] == [[100], [1, POISON, 2], [1], [POISON], [2]]
        await batcher.close()

    asyncio.run(scenario())


def test_the_rest_of_a_split_request_does_not_run_after_its_failure(device: Device) -> None:
    fake = Doubler(largest=2)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        with pytest.raises(BackendFailed):
            await batcher.submit(rows(POISON, 1, 2, 3, 4, 5))
        assert fake.runs[0] == [POISON, 1]
        assert not any(2 in run for run in fake.runs)
        assert batcher.stats().waiting_rows == 0
        await batcher.close()

    asyncio.run(scenario())


def test_outputs_without_a_row_for_each_row_are_a_failure(device: Device) -> None:
    fake = Doubler()
    fake.run = lambda batch: (batch[0].sum(),)  # type: ignore[method-assign]

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        with pytest.raises(BackendFailed, match="one row for each row"):
            await batcher.submit(rows(1, 2))
        await batcher.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 4),
        torch.zeros(3),
        torch.zeros(0, 3),
        torch.zeros(()),
        torch.zeros(2, 3, dtype=torch.float64),
        np.zeros((2, 3), dtype=np.int32),
        np.array([["a", "b", "c"]]),
    ],
)
def test_wrong_shapes_and_types_never_reach_the_device(
    device: Device, wrong: torch.Tensor | np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        with pytest.raises(BadInput):
            await batcher.submit(wrong)
        await batcher.close()

    asyncio.run(scenario())
    assert fake.runs == []


@pytest.fixture(scope="module")
def several() -> Prepared:
    prepared = backend_named("torch").prepare(pair.program(), "cpu", "float32", (1, 4))
    list(prepared.warm())
    return prepared


def test_several_inputs_go_by_order_or_name_and_nobody_is_mixed_up(
    device: Device, several: Prepared
) -> None:
    async def scenario() -> None:
        batcher = Batcher(several, device)
        labels = [(1, 5), (2,), (3, 4, 6, 7, 8), (9,)]
        rows = [pair.rows(*each) for each in labels]
        named = [dict(zip(("input_1", "input_0"), each[::-1], strict=True)) for each in rows]
        asked = [batcher.submit(each) for pairs in zip(rows, named, strict=True) for each in pairs]
        results = await asyncio.gather(*asked)
        assert batcher.stats().batches < 8  # some shared a batch
        for own, first, second in zip(labels, results[::2], results[1::2], strict=True):
            assert pair.is_answer(first.outputs, *own)
            assert pair.is_answer(second.outputs, *own)
        await batcher.close()

    asyncio.run(scenario())


def test_several_inputs_that_do_not_fit_are_refused(device: Device, several: Prepared) -> None:
    x, y = pair.rows(1, 2)

    async def scenario() -> None:
        batcher = Batcher(several, device)
        for wrong, word in (
            (x, "2: "),
            ((x, y, y), "3 inputs"),
            ((y, x), "input_0 has shape"),
            ((x, y[:1]), "differ in rows"),
            ((x, y.float()), "input_1 is torch.float32"),
            ({"input_0": x}, "names the inputs"),
            ({"input_0": x, "y": y}, "names the inputs"),
        ):
            with pytest.raises(BadInput, match=word):
                await batcher.submit(wrong)
        assert batcher.stats().batches == 0
        await batcher.close()

    asyncio.run(scenario())


def test_read_only_and_strided_arrays_are_accepted(device: Device) -> None:
    read_only = np.frombuffer(np.full((2, 3), 5, np.float32).tobytes(), np.float32).reshape(2, 3)
    strided = np.repeat(np.array([[1], [2]], np.float32), 3, 1)[::-1]

    async def scenario() -> None:
        batcher = Batcher(Doubler(), device)
        assert is_own(await batcher.submit(read_only), (5, 5))
        assert is_own(await batcher.submit(strided), (2, 1))
        await batcher.close()

    asyncio.run(scenario())


def test_closing_answers_what_waits_and_refuses_what_comes(device: Device) -> None:
    fake = Doubler(largest=2)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        tasks = [asyncio.create_task(batcher.submit(rows(value))) for value in range(5)]
        await _settle()
        closing = asyncio.create_task(batcher.close())
        await _settle()
        with pytest.raises(NotLoaded):
            await batcher.submit(rows(1))
        assert not closing.done()
        fake.gate.set()
        await closing
        results = await asyncio.gather(first, *tasks)
        assert all(is_own(result, (value,)) for value, result in enumerate(results[1:]))

    asyncio.run(scenario())


def test_closing_without_draining_fails_what_waits_but_not_what_runs(device: Device) -> None:
    fake = Doubler()

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        waiting = asyncio.create_task(batcher.submit(rows(1)))
        await _settle()
        closing = asyncio.create_task(batcher.close(drain=False))
        await _settle()
        with pytest.raises(NotLoaded):
            await waiting
        fake.gate.set()
        await closing
        assert is_own(await first, (100,))
        assert fake.runs == [[100]]

    asyncio.run(scenario())


def test_a_device_closed_too_early_leaves_nobody_hanging() -> None:
    fake = Doubler(largest=1)
    device = Device("cpu", threads=1)

    async def scenario() -> None:
        batcher = Batcher(fake, device)
        first = await _held(batcher, fake)
        waiting = asyncio.create_task(batcher.submit(rows(1)))
        await _settle()
        closing = asyncio.create_task(asyncio.to_thread(device.close))
        await asyncio.sleep(0.02)
        fake.gate.set()
        assert is_own(await first, (100,))
        with pytest.raises(NotLoaded):
            await asyncio.wait_for(waiting, 5)
        await closing
        with pytest.raises(NotLoaded):
            await batcher.submit(rows(2))

    asyncio.run(scenario())


def test_two_models_take_turns_on_one_device(device: Device) -> None:
    order: list[str] = []

    def recording(name: str) -> Doubler:
        fake = Doubler(largest=1)
        plain = fake.run

        def run(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            order.append(name)
            return plain(batch)

        fake.run = run  # type: ignore[method-assign]
        return fake

    async def scenario() -> None:
        one, two = recording("one"), recording("two")
        first, second = Batcher(one, device), Batcher(two, device)
        held = await _held(first, one)
        tasks = [asyncio.create_task(first.submit(rows(value))) for value in range(4)]
        await _settle()
        tasks += [asyncio.create_task(second.submit(rows(value))) for value in range(4)]
        await _settle()
        one.gate.set()
        await asyncio.gather(held, *tasks)
        await first.close()
        await second.close()

    asyncio.run(scenario())
    assert order == ["one", "two"] * 4 + ["one"]


def test_a_full_queue_refuses_before_anything_is_read_or_decoded(device: Device) -> None:
    fake = Doubler(largest=4)

    async def scenario() -> None:
        batcher = Batcher(fake, device, BatchLimits(queue_rows=5))
        first = await _held(batcher, fake)
        assert batcher.full() is None
        with batcher.expecting(4):
            assert batcher.full() is None
            waiting = asyncio.create_task(batcher.submit(rows(1)))
            await _settle()
            refused = batcher.full()
            assert refused is not None
            assert refused.extra["retry_after"] > 0
            with pytest.raises(QueueFull), batcher.expecting(1):
                pass
            with pytest.raises(QueueFull):
                await batcher.submit(rows(2))
        # The places that were held are free again; more rows than can wait is another error.
        assert batcher.full() is None
        assert batcher.stats().rejected == 3
        others = asyncio.create_task(batcher.submit(rows(3, 4, 5, 6)))
        await _settle()
        fake.gate.set()
        await asyncio.gather(first, waiting, others)
        with batcher.expecting(6), pytest.raises(BadInput):
            await batcher.submit(rows(*range(6)))
        await batcher.close()

    asyncio.run(scenario())
