"""A program that serves: prepared, warm, with its batcher, on its device."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from service.errors import LimitExceeded, NotLoaded
from service.graph import Program, peak_bytes
from service.serving.backends import (
    Choices,
    Description,
    Precision,
    Prepared,
    backend_named,
    powers_of_two,
)
from service.serving.batcher import Batcher
from service.serving.device import Device
from service.serving.stats import BatcherStats, BatchLimits

T = TypeVar("T")
_END = object()
Form = Literal["deploy", "train"]


@dataclass(frozen=True)
class LoadOptions:
    """How to load a version.

    `device`: `cpu`, `cuda`, `cuda:N`, or `auto` for a CUDA device if there is one. `backend`: one
    of `backend_names()`, or `auto` for the fastest of them that agrees. `precision`: what it
    computes in. `max_batch` (rows, default 32): the largest batch; powers of two up to it are
    prepared. `calibration` gives rows of the user's, [N, *shape] for each input, and is called off
    the event loop: they set the ranges of int8, and lower precisions are certified on them.
    `max_bytes` (bytes, default 4 GiB): what the values of one run may take; batches that need more
    are not prepared, and a program that needs more for one row is refused.
    """

    device: str = "auto"
    backend: str = "torch"
    precision: Precision = "float32"
    max_batch: int = 32
    calibration: Callable[[], tuple[Tensor, ...]] | None = None
    max_bytes: int = 4 << 30

    @property
    def place(self) -> str:
        """The device as a torch device string with its index, so that one device has one name."""
        if self.device == "auto":
            return "cuda:0" if torch.cuda.is_available() else "cpu"
        return "cuda:0" if self.device == "cuda" else self.device


class ModelKey(NamedTuple):
    """One program among those loaded."""

    model: str
    version: int
    form: Form = "deploy"


@dataclass(frozen=True)
class LoadedModel:
    """What is known about a loaded program; `idle_seconds` since its last request."""

    key: ModelKey
    description: Description
    stats: BatcherStats
    load_seconds: float
    idle_seconds: float


class Runner:
    """One loaded program. `pins` counts those who need it to stay loaded."""

    def __init__(
        self,
        key: ModelKey,
        prepared: Prepared,
        device: Device,
        limits: BatchLimits,
        load_seconds: float,
    ) -> None:
        self.key = key
        self.prepared = prepared
        self.device = device
        self.batcher = Batcher(prepared, device, limits)
        self.description = prepared.describe()
        self.load_seconds = load_seconds
        self.last_used = time.monotonic()
        self.pins = 0

    @property
    def idle_seconds(self) -> float:
        """Seconds since it was last touched, or made."""
        return time.monotonic() - self.last_used

    def touch(self) -> None:
        """Somebody used it."""
        self.last_used = time.monotonic()

    def loaded(self) -> LoadedModel:
        """What there is to tell about it, with counts and idle time of this moment."""
        return LoadedModel(
            self.key,
            self.description,
            self.batcher.stats(),
            self.load_seconds,
            self.idle_seconds,
        )

    async def close(self) -> None:
        """Answer what waits, then give the memory back."""
        await self.batcher.close()
        await self.device.call(lambda: self.device.free(self.prepared, self.prepared.close))


async def start_runner(
    key: ModelKey,
    read: Callable[[], Program],
    options: LoadOptions,
    device: Device,
    limits: BatchLimits,
    choices: Choices,
) -> Runner:
    """Read and prepare a program off the loop, then warm it on its device, step by step.

    The device serves other programs meanwhile and between the steps. Raises what `read` raises,
    LimitExceeded when a single row takes more than `options.max_bytes`, BackendFailed when the
    program cannot run as `options` ask, CertificateFailed when what runs does not agree with the
    program, and ModelFaulty when the device is lost.
    """
    started = time.monotonic()
    backend = backend_named(options.backend, choices, device.threads)

    def prepare() -> Prepared:
        program = read()
        sizes = powers_of_two(_largest_batch(program, options))
        own = options.calibration() if options.calibration is not None else None
        return backend.prepare(program, device.device, options.precision, sizes, own)

    try:
        prepared = await asyncio.to_thread(prepare)
    except Exception as error:
        with contextlib.suppress(NotLoaded):
            await device.call(device.ask)
        if device.lost is not None:
            raise device.refusal() from error
        raise
    try:
        await run_steps(device, prepared.warm())
    except BaseException:
        with contextlib.suppress(NotLoaded):
            device.post(lambda: device.free(prepared, prepared.close))
        raise
    return Runner(key, prepared, device, limits, time.monotonic() - started)


def _largest_batch(program: Program, options: LoadOptions) -> int:
    """`options.max_batch`, halved until a run takes at most `options.max_bytes`.

    Converting tried a few samples in a process with a limit of its own. This process has none, and
    a network that is harmless for three rows may take ten times as much for 32.
    """
    batch = options.max_batch
    while (need := peak_bytes(program, batch)) > options.max_bytes:
        if batch == 1:
            raise LimitExceeded(
                f"One row takes {need} bytes of values inside the network; "
                f"max_activation_bytes is {options.max_bytes}.",
                remedy="Use smaller inputs, or raise FOLDSERVE_MAX_ACTIVATION_BYTES.",
                limit="max_activation_bytes",
                value=options.max_bytes,
            )
        batch = (batch + 1) // 2
    return batch


async def run_steps(device: Device, steps: Iterator[None]) -> None:
    """Run a generator on the device thread, one step per job, so that others get their turns.

    Raises what a step raises, or ModelFaulty when the device is lost.
    """

    def advance() -> bool:
        if device.lost is not None:
            raise device.refusal()
        try:
            return next(steps, _END) is not _END
        except Exception as error:
            device.ask()
            if device.lost is not None:
                raise device.refusal() from error
            raise

    while await device.call(advance):
        pass


async def run_steps_for(device: Device, steps: Generator[None, None, T]) -> T:
    """`run_steps`, returning what the generator returns."""
    result: list[T] = []

    def whole() -> Iterator[None]:
        result.append((yield from steps))

    await run_steps(device, whole())
    return result[0]
