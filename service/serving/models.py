"""The set of loaded models: load beside the old one, flip, drain, unload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from service.errors import DeviceLost, FormNotAvailable, NotLoaded, QueueFull
from service.graph import Program
from service.serving.backends import Choices, Prepared
from service.serving.device import Device
from service.serving.garbage import settle
from service.serving.request import Result, Rows
from service.serving.runner import (
    Form,
    LoadedModel,
    LoadOptions,
    ModelKey,
    Runner,
    run_steps_for,
    start_runner,
)
from service.serving.stats import BatchLimits

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSetLimits:
    """Bounds of the whole set.

    `batch`: each model's queue. `threads` (CPU threads, default 0 = all that are available): what
    one forward pass may use; there is one device thread, so it is also what serving uses in all.
    `train_idle_seconds` (s, default 600): a training form that nobody asked for this long is
    unloaded.
    """

    batch: BatchLimits = field(default_factory=BatchLimits)
    threads: int = 0
    train_idle_seconds: float = 600.0


@dataclass(frozen=True)
class _Source:
    """Where a version's programs come from, and how they are to be loaded."""

    read: Mapping[Form, Callable[[], Program]]
    options: LoadOptions


class ModelSet:
    """Loaded programs by model, version and form; used from one event loop."""

    def __init__(
        self, limits: ModelSetLimits | None = None, choices: Choices | None = None
    ) -> None:
        """What was measured to be fastest is remembered in `choices`."""
        self.limits = limits or ModelSetLimits()
        self._choices = choices or Choices()
        self._devices: dict[str, Device] = {}
        self._sources: dict[tuple[str, int], _Source] = {}
        self._runners: dict[ModelKey, Runner] = {}
        self._loading: dict[ModelKey, asyncio.Task[Runner]] = {}
        self._serving: dict[str, int] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._closing = False

    async def load(
        self,
        model: str,
        version: int,
        read: Mapping[Form, Callable[[], Program]],
        options: LoadOptions | None = None,
    ) -> LoadedModel:
        """Load the deploy form of a version, warm; its training form follows on first use.

        `read` gives a program per form and is called off the event loop. If the version is loaded
        already, it is replaced once the new one is warm. Requests are served all the while. Raises
        what `read` or the backend raises; then everything is as it was before.
        """
        options = options or LoadOptions()
        key = ModelKey(model, version)
        runner = await self._start(key, read["deploy"], options)
        if self._closing:
            await runner.close()
            raise NotLoaded("The service is stopping.")
        stale = self._forms(model, version)
        for old in stale:
            del self._runners[old.key]
        self._runners[key] = runner
        self._sources[model, version] = _Source(dict(read), options)
        self._serving.setdefault(model, version)
        await _close(stale)
        settle()
        return runner.loaded()

    def activate(self, model: str, version: int) -> None:
        """Let `version` answer when no version is asked for. Raises NotLoaded if it is not here."""
        if ModelKey(model, version) not in self._runners:
            raise NotLoaded(f"Version {version} of {model} is not loaded.")
        self._serving[model] = version

    def active(self, model: str) -> int | None:
        """The version that answers when none is asked for."""
        return self._serving.get(model)

    async def unload(self, model: str, version: int | None = None) -> None:
        """Answer what waits, then unload one version, or all; unknown ones are no error."""
        versions = [v for m, v in self._sources if m == model and version in (None, v)]
        gone: list[Runner] = []
        for each in versions:
            del self._sources[model, each]
            for runner in self._forms(model, each):
                gone.append(self._runners.pop(runner.key))
            if self._serving.get(model) == each:
                del self._serving[model]
        await _close(gone)

    async def predict(
        self,
        model: str,
        rows: Rows,
        *,
        version: int | None = None,
        form: Form = "deploy",
        deadline: float | None = None,
    ) -> Result:
        """Outputs for `rows`, as `Batcher.submit` takes them, before the moment `deadline`.

        Raises NotLoaded, FormNotAvailable, and what `Batcher.submit` raises.
        """
        key = self._key(model, version, form)
        runner = self._runners.get(key) or await self._runner(key)
        runner.touch()
        return await runner.batcher.submit(rows, deadline)  # nothing may be awaited in between

    def takes_levels(self, model: str, version: int, form: Form) -> bool:
        """See `Batcher.takes_levels`; False for a form that is not loaded yet."""
        runner = self._runners.get(ModelKey(model, version, form))
        return runner is not None and runner.batcher.takes_levels

    def full(self, model: str, version: int, form: Form) -> QueueFull | None:
        """What one more row would be refused with, if it would; a form not loaded refuses none."""
        runner = self._runners.get(ModelKey(model, version, form))
        return None if runner is None else runner.batcher.full()

    def expecting(
        self, model: str, version: int, form: Form, rows: int
    ) -> contextlib.AbstractContextManager[None]:
        """Hold places for rows that are being decoded; see `Batcher.expecting`."""
        runner = self._runners.get(ModelKey(model, version, form))
        return contextlib.nullcontext() if runner is None else runner.batcher.expecting(rows)

    async def prepared(
        self, model: str, version: int | None = None, form: Form = "deploy"
    ) -> Prepared:
        """The program itself, loaded if need be: for its shape, dtype and description."""
        return (await self._runner(self._key(model, version, form))).prepared

    async def on_device(
        self,
        model: str,
        version: int | None,
        forms: Sequence[Form],
        work: Callable[[Mapping[Form, Prepared]], Generator[None, None, T]],
    ) -> T:
        """Run `work` on the device where the forms are loaded, one step at a time.

        Between the steps the device serves; within a step nothing else runs there, so a benchmark
        measures itself alone. The forms stay loaded until it is done.
        """
        runners: dict[Form, Runner] = {}
        try:
            for form in forms:
                runners[form] = await self._runner(self._key(model, version, form))
                runners[form].pins += 1
            steps = work({form: runner.prepared for form, runner in runners.items()})
            return await run_steps_for(runners[forms[0]].device, steps)
        finally:
            for runner in runners.values():
                runner.pins -= 1
                runner.touch()

    def loaded(self) -> tuple[LoadedModel, ...]:
        """Everything that is loaded now, in order of loading."""
        return tuple(runner.loaded() for runner in self._runners.values())

    def faulty(self) -> dict[tuple[str, int], Exception]:
        """Versions of which a program is out of order, and why; `load` them anew."""
        return {
            (key.model, key.version): runner.batcher.fault
            for key, runner in self._runners.items()
            if runner.batcher.fault is not None
        }

    @property
    def lost(self) -> tuple[DeviceLost, ...]:
        """The devices that compute nothing any more, until the process is another one."""
        return tuple(device.lost for device in self._devices.values() if device.lost is not None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights of everything loaded, in the precision it is loaded in."""
        return sum(runner.description.weight_bytes for runner in self._runners.values())

    async def sweep(self) -> None:
        """Unload training forms that have been idle for longer than the limit."""
        idle = [
            runner
            for runner in self._runners.values()
            if runner.key.form == "train"
            and not runner.pins
            and runner.idle_seconds >= self.limits.train_idle_seconds
        ]
        for runner in idle:
            del self._runners[runner.key]
            log.info("unloading the idle training form of %s", runner.key)
        await _close(idle)

    async def close(self) -> None:
        """Answer what waits, unload everything and end the device threads."""
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
        await asyncio.gather(*self._loading.values(), return_exceptions=True)
        for model in {model for model, _ in self._sources}:
            await self.unload(model)
        for device in self._devices.values():
            await asyncio.to_thread(device.close)

    def _key(self, model: str, version: int | None, form: Form) -> ModelKey:
        found = self._serving.get(model) if version is None else version
        if found is None:
            raise NotLoaded(f"No version of {model} is loaded.")
        return ModelKey(model, found, form)

    async def _runner(self, key: ModelKey) -> Runner:
        """The runner of `key`; a training form is loaded by whoever asks first, once."""
        while (runner := self._runners.get(key)) is None:
            source = self._sources.get((key.model, key.version))
            if source is None or self._closing:
                raise NotLoaded(f"Version {key.version} of {key.model} is not loaded.")
            if key.form not in source.read:
                raise FormNotAvailable(f"Version {key.version} has no {key.form} form.")
            if (task := self._loading.get(key)) is None:
                task = asyncio.create_task(self._load_form(key, source))
                task.add_done_callback(_noticed)
                self._loading[key] = task
            await asyncio.shield(task)  # a client that leaves does not stop it for the others
        return runner

    async def _load_form(self, key: ModelKey, source: _Source) -> Runner:
        options = source.options
        if options.precision == "int8":  # it is there to be compared with, as it was trained
            options = replace(options, precision="float32")
        try:
            runner = await self._start(key, source.read[key.form], options)
        finally:
            del self._loading[key]
        if self._sources.get((key.model, key.version)) is not source or self._closing:
            await runner.close()
            raise NotLoaded(f"Version {key.version} of {key.model} was unloaded meanwhile.")
        self._runners[key] = runner
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep_forever())
        return runner

    async def _start(
        self, key: ModelKey, read: Callable[[], Program], options: LoadOptions
    ) -> Runner:
        place = options.place
        if place not in self._devices:
            self._devices[place] = Device(place, self.limits.threads)
        return await start_runner(
            key, read, options, self._devices[place], self.limits.batch, self._choices
        )

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, max(0.05, self.limits.train_idle_seconds / 4)))
            await self.sweep()

    def _forms(self, model: str, version: int) -> list[Runner]:
        keys = (ModelKey(model, version, "deploy"), ModelKey(model, version, "train"))
        return [self._runners[key] for key in keys if key in self._runners]


def _noticed(task: asyncio.Task[Runner]) -> None:
    """If everyone who waited for a failed load has left, the failure is logged here alone."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("a form could not be loaded: %s", error)


async def _close(runners: Sequence[Runner]) -> None:
    await asyncio.gather(*(runner.close() for runner in runners))
