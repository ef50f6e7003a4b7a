"""Keeps what is loaded in step with the catalog: at the start, when versions come, go or switch.

The catalog says which version of a model is the default; that one is loaded, warm, and answers.
Other ready versions are loaded when somebody asks for them by number and leave again when nobody
does. The worker prepares a new version here before it is published, and the flip comes after.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import structlog
import torch
from torch import Tensor

from service.bench import BenchPlan, Comparison, Subject, compare_in_steps
from service.checkpoint import ReadLimits
from service.checkpoint.child import ChildLimits
from service.errors import (
    FoldserveError,
    InvalidConfig,
    ModelNotFound,
    ModelUnloaded,
    NotLoaded,
    NotServable,
    VersionNotFound,
    VersionNotReady,
)
from service.graph import Program, load_program
from service.networks import ModelConfig, parse_changes
from service.recovery import Recovery
from service.serving import (
    Description,
    Form,
    LoadOptions,
    ModelSet,
    Precision,
    Prepared,
    Result,
    Rows,
    RowSpec,
    backend_names,
    can_quantise,
    random_rows,
)
from service.settings import Settings
from service.store import BlobStore, Catalog, State, VersionRecord
from service.worker import WorkerLimits

T = TypeVar("T")
log = structlog.get_logger(__name__)

_ARTIFACTS: Mapping[Form, str] = {"deploy": "deploy_program", "train": "train_program"}
_PRECISIONS: Mapping[str, Precision] = {
    "auto": "float32",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "int8": "int8",
}
CALIBRATION = "calibration"
"""Kind of the artifact that holds a version's calibration inputs."""

CALIBRATION_ROWS = 32
"""Fewest calibration inputs: half of them set ranges, and half certify the outcome."""

MOST_CALIBRATION_ROWS = 600
"""Calibration inputs that are used; more hardly change the outcome and make loading slow."""


def check_config(text: str | bytes) -> dict[str, Any]:
    """The config of an upload, checked as far as it can be before the file is read.

    Returns it as a JSON object with every default filled in. Raises InvalidConfig.
    """
    config = ModelConfig.from_json(text)
    if config.backend not in ("auto", *backend_names()):
        raise InvalidConfig(
            f"`backend` is {config.backend!r}, which is not available here.",
            remedy=f"Use one of auto, {', '.join(backend_names())}.",
            field="backend",
        )
    if config.precision == "int8" and not can_quantise():
        raise InvalidConfig(
            "`precision` is int8, which is not available here.",
            remedy="Install foldserve[int8], or use float32 or bfloat16.",
            field="precision",
        )
    checked: dict[str, Any] = json.loads(config.to_json())
    return checked


def check_changes(text: bytes) -> dict[str, Any]:
    """The fields of a config that `text` changes, checked and filled in. Raises InvalidConfig."""
    changed = parse_changes(text)
    checked: dict[str, Any] = json.loads(changed.to_json())
    return {field: checked[field] for field in json.loads(text)}


def check_calibration(config: Mapping[str, Any], given: bool) -> None:
    """Raises InvalidConfig when a config asks for int8 and no calibration inputs came with it."""
    if config["precision"] == "int8" and not given:
        raise InvalidConfig(
            "`precision` is int8, and no inputs to calibrate it were sent.",
            remedy="Send 64 or more typical inputs as the part `calibration`: one npy array "
            "[N, *input shape], preprocessed as the network takes it.",
            field="precision",
        )


def worker_limits(settings: Settings) -> WorkerLimits:
    """The worker's limits as the settings say."""
    prefix = "reader_"
    reader = {
        name.removeprefix(prefix): getattr(settings, name)
        for name in Settings.model_fields
        if name.startswith(prefix)
    }
    return WorkerLimits(
        poll_seconds=settings.conversion_poll_seconds,
        attempts=settings.conversion_attempts,
        stale_seconds=settings.conversion_stale_seconds,
        read=ReadLimits(file_bytes=settings.max_upload_bytes, **reader),
        child=ChildLimits(
            seconds=settings.conversion_seconds,
            cpu_seconds=math.ceil(settings.conversion_seconds * (settings.conversion_threads + 1)),
            memory_bytes=settings.conversion_memory_bytes,
            file_bytes=2 * settings.max_upload_bytes + (1 << 30),
            threads=settings.conversion_threads,
            nice=0 if settings.conversion_priority == "normal" else 19,
            idle=settings.conversion_priority == "idle",
            scratch_bytes=4 * settings.max_upload_bytes + (2 << 30),
        ),
    )


@dataclass(frozen=True)
class Hosted:
    """A loaded version, with what a request needs to know about it.

    `inputs` and `outputs` say name, shape and dtype of a row of each; `labels` has one name per
    class if the upload gave them; `preprocessing` is the config's object, or None for the defaults.
    """

    model: str
    version: int
    inputs: tuple[RowSpec, ...]
    outputs: tuple[RowSpec, ...]
    labels: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    models: ModelSet

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of one row of the first input, which is the only one of most networks."""
        return self.inputs[0].shape

    def require_room(self, form: Form) -> None:
        """Raise QueueFull if one more row would be refused: before a body is read for nothing."""
        self.models.require_room(self.model, self.version, form)

    def expecting(self, form: Form, rows: int) -> contextlib.AbstractContextManager[None]:
        """Hold places in the queue for rows that are being decoded. Raises QueueFull."""
        return self.models.expecting(self.model, self.version, form, rows)

    async def predict(self, rows: Rows, form: Form) -> Result:
        """Outputs for rows, as `Batcher.submit` takes them. Raises what `ModelSet.predict` does."""
        return await self.models.predict(self.model, rows, version=self.version, form=form)


class Host:
    """The loaded models of one service. Methods that await run on its event loop.

    `prepare`, `published` and `abandoned` are the worker's hooks: they are called from its thread
    and wait for the loop.
    """

    def __init__(
        self, settings: Settings, catalog: Catalog, blobs: BlobStore, models: ModelSet
    ) -> None:
        self.settings, self.catalog, self.blobs, self.models = settings, catalog, blobs, models
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

        Raises ModelNotFound, VersionNotFound, VersionNotReady, ModelUnloaded, or what loading
        raises.
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

        Raises ModelNotFound, VersionNotReady, or what loading raises; then it stays as it was.
        """
        record = await asyncio.to_thread(self.catalog.get_model, model)
        if record.default_version is None:
            raise VersionNotReady(f"Model {model!r} has no version that is ready.")
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
            self._hosted[key] = replace(
                loaded,
                labels=_labels(record),
                preprocessing=record.config.get("preprocessing"),
            )

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
        if record.default_version is None:
            raise VersionNotReady(f"Model {model!r} has no version that is ready.")
        return record.default_version

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
        """Load a version whose programs are in `files`, or else in the store; how it runs.

        The training form is read again whenever it is first wanted, so that one always comes from
        the store: a conversion's files are gone by then.
        """
        kinds = files or version.artifacts
        name, number = version.model, version.version

        def deploy() -> Program:
            if files:
                return load_program(files[_ARTIFACTS["deploy"]])
            return self._read(name, number, "deploy")

        reads: dict[Form, Callable[[], Program]] = {"deploy": deploy}
        if _ARTIFACTS["train"] in kinds:
            reads["train"] = lambda: self._read(name, number, "train")
        loaded = await self.models.load(name, number, reads, self._options(version))
        if name in self._unloaded:  # meanwhile
            await self.models.unload(name, number)
            self._check_serving(name)
        prepared = await self.models.prepared(name, number)
        self._hosted[name, number] = Hosted(
            model=name,
            version=number,
            inputs=prepared.inputs,
            outputs=prepared.outputs,
            labels=_labels(version),
            preprocessing=version.config.get("preprocessing"),
            models=self.models,
        )
        return loaded.description

    def _read(self, model: str, version: int, form: Form) -> Program:
        record = self.catalog.get_version(model, version)
        return load_program(self.blobs.open_path(record.artifacts[_ARTIFACTS[form]]))

    def _options(self, version: VersionRecord) -> LoadOptions:
        asked = version.config
        backend = asked.get("backend", "auto")
        blob = version.artifacts.get(CALIBRATION)
        calibration = None if blob is None else partial(self._calibration, blob)
        return LoadOptions(
            device=self.settings.device,
            backend=self.settings.backend if backend == "auto" else backend,
            precision=_PRECISIONS[asked.get("precision", "auto")],
            max_batch=self.settings.max_batch,
            calibration=calibration,
            max_bytes=self.settings.max_activation_bytes,
        )

    def _calibration(self, blob: str) -> tuple[Tensor, ...]:
        """The uploaded calibration inputs [N, *input shape]. Raises InvalidConfig."""
        path = self.blobs.open_path(blob)
        try:  # mapped, so that a header cannot claim more than the file holds
            array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=4096)
        except (ValueError, OSError, EOFError) as error:
            raise InvalidConfig(
                f"`calibration` is not an npy array: {error}.", field="calibration"
            ) from None
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 2:
            raise InvalidConfig("`calibration` is no array of float32 rows.", field="calibration")
        if len(array) < CALIBRATION_ROWS:
            raise InvalidConfig(
                f"`calibration` has {len(array)} rows; {CALIBRATION_ROWS} or more are needed.",
                field="calibration",
            )
        rows = np.ascontiguousarray(array[:MOST_CALIBRATION_ROWS], dtype=np.float32)
        if not np.isfinite(rows).all():
            raise InvalidConfig(
                "`calibration` holds numbers that are not finite.", field="calibration"
            )
        return (torch.from_numpy(rows),)

    # ---- the worker's hooks -------------------------------------------------------------

    def prepare(
        self, version: VersionRecord, programs: Mapping[str, Path]
    ) -> dict[str, Any] | None:
        """Load and warm a converted version beside whatever serves now, if it can be served.

        Returns how it runs: `Description.to_dict`.
        """
        if _ARTIFACTS["deploy"] not in programs or version.model in self._unloaded:
            return None
        with contextlib.suppress(ModelUnloaded):  # it is published all the same
            return self._on_loop(self._load_into_set(version, programs)).to_dict()
        return None

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


def _labels(version: VersionRecord) -> tuple[str, ...] | None:
    labels = version.config.get("labels")
    return tuple(labels) if labels else None
