"""Keeps what is loaded in step with the catalog: at the start, when versions come, go or switch.

The catalog says which version of a model is the default; that one is loaded, warm, and answers.
Other ready versions are loaded when somebody asks for them by number and leave again when nobody
does. The worker prepares a new version here before it is published, and the flip comes after.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Coroutine, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from service.bench import BenchPlan, Comparison, Subject, compare_in_steps
from service.errors import (
    FoldserveError,
    ModelFaulty,
    ModelNotFound,
    ModelUnloaded,
    NotLoaded,
    NotServable,
    VersionNotFound,
    VersionNotReady,
)
from service.hosting.hosted import Hosted
from service.hosting.loader import ARTIFACTS, Loader
from service.recovery import Recovery
from service.serving import Description, Form, ModelSet, Prepared, random_rows
from service.settings import Settings
from service.store import BlobStore, Catalog, State, VersionRecord

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Host:
    """The loaded models of one service. Methods that await run on its event loop.

    `prepare`, `published` and `abandoned` are the worker's hooks: they are called from its thread
    and wait for the loop.
    """

    def __init__(
        self, settings: Settings, catalog: Catalog, blobs: BlobStore, models: ModelSet
    ) -> None:
        self.settings, self.catalog, self.models = settings, catalog, models
        self._loader = Loader(settings, catalog, blobs)
        self.failures: dict[tuple[str, int], FoldserveError] = {}
        self.started = False
        self._hosted: dict[tuple[str, int], Hosted] = {}
        self._default: dict[str, int] = {}
        self._unloaded: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loading: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._measuring = asyncio.Lock()
        self.recovery = Recovery(
            models.faulty,
            self._reload,
            check_seconds=settings.fault_check_seconds,
            attempts=settings.fault_attempts,
            longest_wait=settings.fault_wait_seconds,
        )
        self._following: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    # ---- life ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to load every model's default in the background; `started` tells when it is done.

        A version that cannot be loaded is logged, kept in `failures`, and does not hold up others.
        """
        self._loop = asyncio.get_running_loop()
        self._tasks = [
            asyncio.create_task(self._load_defaults()),
            asyncio.create_task(self._unload_idle()),
            asyncio.create_task(self._keep_up()),
            asyncio.create_task(self.recovery.run()),
        ]

    async def close(self) -> None:
        """Answer what waits and unload everything."""
        for task in (*self._tasks, *self._loading.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loading.values(), return_exceptions=True)
        await self.models.close()

    async def _load_defaults(self) -> None:
        for model in await asyncio.to_thread(self.catalog.defaults):
            with contextlib.suppress(FoldserveError):  # kept in `failures`
                await self.follow(model)
        self.started = True

    async def _keep_up(self) -> None:
        """Follow what other services on the same catalog change."""
        while True:
            await asyncio.sleep(self.settings.follow_seconds)
            if not self.started:
                continue
            try:
                await self._catch_up()
            except FoldserveError as error:
                log.warning("could_not_follow", detail=error.detail)
            except Exception:
                log.exception("could_not_follow")

    async def _catch_up(self) -> None:
        here = [*self._hosted, *self.failures]  # first: what is here by now, the catalog knows
        defaults = await asyncio.to_thread(self.catalog.defaults)
        for model, wanted in defaults.items():
            known_to_fail = wanted is not None and (model, wanted) in self.failures
            left_out = known_to_fail or model in self._unloaded
            if wanted != self._default.get(model) and not left_out:
                with contextlib.suppress(FoldserveError):  # kept in `failures`
                    await self.follow(model)
        for model, version in here:
            if model not in defaults:
                await self.forget(model)
            elif version != self._default.get(model):
                try:
                    await asyncio.to_thread(self.catalog.get_version, model, version)
                except (ModelNotFound, VersionNotFound):
                    await self.forget(model, version)

    async def _unload_idle(self) -> None:
        limit = self.settings.idle_unload_seconds
        while True:
            await asyncio.sleep(max(0.05, limit / 4))
            for loaded in self.models.loaded():
                key = loaded.key
                default = self._default.get(key.model) == key.version
                if key.form == "deploy" and not default and loaded.idle_seconds >= limit:
                    await self._unload(key.model, key.version)

    # ---- loading ------------------------------------------------------------------------

    async def follow(self, model: str) -> None:
        """Make the model's default answer: load it if need be, flip, unload the one before.

        One at a time for a model, and the catalog is read in turn: the last change wins. Raises
        ModelNotFound or what loading raises; then the version before keeps answering. A model that
        was taken out of serving stays out.
        """
        async with self._following[model]:
            if model in self._unloaded:
                return
            record = await asyncio.to_thread(self.catalog.get_model, model)
            wanted, before = record.default_version, self._default.get(model)
            if wanted is None:
                self._default.pop(model, None)
                return
            await self.ensure(model, wanted)
            self._default[model] = wanted
            self.models.activate(model, wanted)
            if before is not None and before != wanted:
                await self._unload(model, before)

    def hosted(self, model: str, version: int | None) -> Hosted | None:
        """A version that is loaded, None asking for the default; None when it is not loaded."""
        number = self._default.get(model) if version is None else version
        return None if number is None else self._hosted.get((model, number))

    def default(self, model: str) -> int | None:
        """The version that answers when none is asked for, once it is loaded."""
        return self._default.get(model)

    async def ensure(self, model: str, version: int | None) -> int:
        """Have a version loaded, None being the default, and return its number.

        Raises ModelNotFound, VersionNotFound, VersionNotReady, NotServable, ModelUnloaded, or what
        loading raises.
        """
        self._check_serving(model)
        if version is None:
            version = await self._catalog_default(model)
        if (model, version) in self._hosted:
            return version
        self.recovery.check((model, version))
        key = (model, version)
        if (task := self._loading.get(key)) is None:
            task = asyncio.create_task(self._load(model, version))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        await asyncio.shield(task)  # whoever asked first may leave; the others still wait
        return version

    async def unload(self, model: str) -> None:
        """Take a model out of serving, all its versions, until `load` or the next start.

        Requests that wait are answered first; later ones raise ModelUnloaded.
        """
        self._unloaded.add(model)
        self._default.pop(model, None)
        await self._unload(model, None)

    async def load(self, model: str) -> None:
        """Serve a model's default, also after `unload`; it is warm when this returns.

        Raises ModelNotFound, VersionNotReady, NotServable, or what loading raises; then it stays as
        it was.
        """
        await self._catalog_default(model)
        was_unloaded = self.is_unloaded(model)
        self._unloaded.discard(model)
        try:
            await self.follow(model)
        except BaseException:
            if was_unloaded:
                self._unloaded.add(model)
            raise

    def describe_anew(self, record: VersionRecord) -> None:
        """Take over a version's labels and preprocessing, if it is loaded."""
        key = (record.model, record.version)
        if (loaded := self._hosted.get(key)) is not None:
            self._hosted[key] = loaded.described_by(record)

    def is_unloaded(self, model: str) -> bool:
        """Whether the model was taken out of serving."""
        return model in self._unloaded

    def is_loading(self, model: str, version: int) -> bool:
        """Whether a version is on its way into memory."""
        return (model, version) in self._loading

    def _check_serving(self, model: str) -> None:
        if model in self._unloaded:
            raise ModelUnloaded(f"Model {model!r} was taken out of serving.")

    async def forget(self, model: str, version: int | None = None) -> None:
        """Unload a deleted version, or a whole model."""
        if version is None:
            self._unloaded.discard(model)
        if version in (None, self._default.get(model)):
            self._default.pop(model, None)
        self.recovery.forget(model, version)
        await self._unload(model, version)
        for key in [k for k in self.failures if k[0] == model and version in (None, k[1])]:
            del self.failures[key]

    async def _unload(self, model: str, version: int | None) -> None:
        for key in [k for k in self._hosted if k[0] == model and version in (None, k[1])]:
            del self._hosted[key]
        await self.models.unload(model, version)

    async def _reload(self, key: tuple[str, int]) -> None:
        """Unload a version that is out of order and load it anew. Raises what loading raises."""
        await self._unload(*key)
        record = await asyncio.to_thread(self.catalog.get_version, *key)
        await self._load_into_set(record, {})
        if self._default.get(key[0]) == key[1]:
            self.models.activate(*key)

    @property
    def all_faulty(self) -> bool:
        """Whether every default is out of order, as when a device is gone."""
        return bool(self._default) and self._default.items() <= self.recovery.faults.keys()

    async def _catalog_default(self, model: str) -> int:
        record = await asyncio.to_thread(self.catalog.get_model, model)
        if record.default_version is not None:
            return record.default_version
        ready = partial(self.catalog.list_versions, model, limit=1, state=State.READY)
        if (await asyncio.to_thread(ready)).items:
            raise NotServable(f"No version of {model!r} that is ready has a program to run.")
        raise VersionNotReady(f"Model {model!r} has no version that is ready.")

    async def _load(self, model: str, version: int) -> None:
        record = await asyncio.to_thread(self.catalog.get_version, model, version)
        if record.state != State.READY:
            raise VersionNotReady(
                f"Version {version} of {model!r} is {record.state.value}.", state=record.state.value
            )
        if not record.servable:
            raise NotServable(f"Version {version} of {model!r} has no program to run.")
        try:
            await self._load_into_set(record, {})
        except ModelUnloaded:
            raise
        except FoldserveError as error:
            self.failures[model, version] = error
            log.error("load_failed", model=model, version=version, detail=error.detail)
            raise
        self.failures.pop((model, version), None)

    async def _load_into_set(
        self, version: VersionRecord, files: Mapping[str, Path]
    ) -> Description:
        """Load a version whose programs are in `files`, or else in the store; how it runs."""
        name, number = version.model, version.version
        reads, options = self._loader.reads(version, files), self._loader.options(version)
        loaded = await self.models.load(name, number, reads, options)
        if name in self._unloaded:  # meanwhile
            await self.models.unload(name, number)
            self._check_serving(name)
        prepared = await self.models.prepared(name, number)
        self._hosted[name, number] = Hosted.of(version, prepared, self.models)
        return loaded.description

    # ---- the worker's hooks -------------------------------------------------------------

    def prepare(
        self, version: VersionRecord, programs: Mapping[str, Path]
    ) -> dict[str, Any] | None:
        """Load and warm a converted version beside whatever serves now, if it can be served.

        Returns how it runs: `Description.to_dict`. Raises what loading raises, or DeviceLost.
        """
        if ARTIFACTS["deploy"] not in programs or version.model in self._unloaded:
            return None
        try:
            return self._on_loop(self._load_into_set(version, programs)).to_dict()
        except ModelUnloaded:  # it is published all the same
            return None
        except ModelFaulty:
            if lost := self.models.lost:
                raise lost[0] from None
            raise

    def published(self, version: VersionRecord) -> None:
        """Let the model's default answer; that is this version unless the default is pinned."""
        self.describe_anew(version)  # as it was changed during the conversion
        try:
            self._on_loop(self.follow(version.model))
        except FoldserveError as error:  # deleted meanwhile: there is nothing to let answer
            log.info("follow_failed", model=version.model, detail=error.detail)
            self._on_loop(self.forget(version.model, version.version))

    def abandoned(self, version: VersionRecord) -> None:
        """Forget a version that was prepared and then not published."""
        self._on_loop(self.forget(version.model, version.version))

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or self._loop.is_closed():
            work.close()
            raise NotLoaded("The service is stopping.")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- measuring ----------------------------------------------------------------------

    async def benchmark(
        self, model: str, version: int | None, batch_sizes: tuple[int, ...], seconds: float
    ) -> tuple[int, Comparison]:
        """Measure the training form against the deploy form of a version on its device.

        One measurement at a time in the whole service: two would measure each other. Inputs are
        normally distributed with a fixed seed. Raises FormNotAvailable without a training form.
        """
        number = await self.ensure(model, version)
        plan = BenchPlan(batch_sizes=batch_sizes, budget_seconds=seconds)

        def measure(
            forms: Mapping[Form, Prepared],
        ) -> Generator[None, None, Comparison]:
            train, deploy = forms["train"], forms["deploy"]
            return compare_in_steps(
                Subject("training form", train.run, train.describe().to_dict()),
                Subject("deploy form", deploy.run, deploy.describe().to_dict()),
                lambda size: random_rows(deploy.inputs, size),
                plan,
            )

        async with self._measuring:
            started = time.perf_counter()
            comparison = await self.models.on_device(model, number, ("train", "deploy"), measure)
        log.info(
            "benchmark_finished",
            model=model,
            version=number,
            seconds=round(time.perf_counter() - started, 3),
        )
        return number, comparison
