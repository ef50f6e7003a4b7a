"""The background worker: takes queued versions one by one and walks each to `ready` or `rejected`.

    claim -> convert (in a child process) -> store -> prepare -> publish

Conversions are deliberately one at a time and gentle: serving has the machine first.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from service import pipeline
from service.checkpoint import ReadLimits
from service.checkpoint.child import ChildLimits, run_sandboxed, sandbox_features
from service.checkpoint.launch import end_fork_server, start_fork_server
from service.errors import (
    Conflict,
    ConversionCrashed,
    ConversionOutOfMemory,
    DeviceLost,
    FoldserveError,
    ModelNotFound,
    StoreError,
    VersionNotFound,
    out_of_memory,
)
from service.networks import ModelConfig
from service.serving import Tallied, Tally
from service.store import BlobStore, Catalog, VersionRecord
from service.store.files import io_errors
from service.store.leases import Lease, dead_workers, remove

log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 0.2
"""Shortest time between two stored progress reports of the same stage, in seconds."""


RESULTS = ("ready", "rejected", "interrupted")
"""How a conversion ends; an interrupted one is taken up at the next start."""

_DURATION_SECONDS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Hooks(Protocol):
    """What the service does with results. Called from the worker's thread; may block."""

    def prepare(
        self, version: VersionRecord, programs: Mapping[str, Path]
    ) -> dict[str, Any] | None:
        """Load and warm the programs (kinds `deploy_program`, perhaps `train_program`).

        Returns how the version runs, for its resource; None if it cannot be served. DeviceLost ends
        the worker and leaves the version to the next start, if it has an attempt left.
        """

    def published(self, version: VersionRecord) -> None:
        """The version is `ready` in the catalog: let it answer."""

    def abandoned(self, version: VersionRecord) -> None:
        """The version was prepared but not published: forget it."""


@dataclass(frozen=True)
class WorkerLimits:
    """How the worker works: seconds between looks at an empty queue, and limits of a conversion.

    A conversion without a sign of life for `stale_seconds` is taken from its worker; a living one
    gives four in that time.
    """

    poll_seconds: float
    attempts: int
    stale_seconds: float
    read: ReadLimits
    child: ChildLimits


class Worker:
    """One thread over one catalog. `start` once, `stop` to finish; `wake` after an upload.

    `sandbox` says which measures confine its conversions, by name; None until a child was asked.
    """

    def __init__(
        self, catalog: Catalog, blobs: BlobStore, scratch: Path, limits: WorkerLimits, hooks: Hooks
    ) -> None:
        self.catalog, self.blobs, self.scratch = catalog, blobs, scratch
        self.limits, self.hooks = limits, hooks
        self.sandbox: dict[str, bool] | None = None
        self.name = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._durations = {result: Tally(_DURATION_SECONDS) for result in RESULTS}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._cancel = threading.Event()  # of the conversion under way
        self._unsettled = False  # a version may be converting in the catalog and is not here
        self._looked = 0.0  # when the conversions of others were looked at
        self._lease: Lease | None = None
        self._thread = threading.Thread(target=self._run, name="foldserve-worker", daemon=True)

    def start(self) -> None:
        """Take up what dead processes of this machine left behind, then begin."""
        start_fork_server((__name__,))
        dead = dead_workers(self.scratch.absolute())
        self._lease = Lease(self.scratch.absolute(), self.name)
        self._recover(dead)
        remove(self.scratch, dead)
        self._thread.start()

    def _recover(self, dead: tuple[str, ...] = ()) -> None:
        """Queue again, or give up, what others left converting (and these workers in any case)."""
        self._looked = time.monotonic()
        for version in self.catalog.recover_interrupted(
            self.limits.attempts, stale_seconds=self.limits.stale_seconds, dead=dead
        ):
            log.info(
                "conversion_recovered",
                model=version.model,
                version=version.version,
                state=version.state.value,
            )

    def wake(self) -> None:
        """Look at the queue now."""
        self._wake.set()

    def give_up(self) -> None:
        """Begin to stop: claim nothing more, and put the running conversion back in the queue."""
        self._stopping.set()
        self._cancel.set()
        self._wake.set()

    def stop(self, timeout: float) -> None:
        """`give_up`, then wait for the end of the thread."""
        self.give_up()
        self._thread.join(timeout)
        if self._lease is not None and not self._thread.is_alive():
            self._lease.close()

    def end_helpers(self) -> None:
        """After `stop`: end the processes from which conversions are forked."""
        end_fork_server()

    @property
    def alive(self) -> bool:
        """Whether the thread runs: false before `start`, and once it has ended."""
        return self._thread.is_alive()

    def conversions(self) -> dict[str, Tallied]:
        """Durations of the conversions so far, in seconds, by result."""
        return {result: tally.read() for result, tally in self._durations.items()}

    def _run(self) -> None:
        try:
            # Asks a child once; it also has the fork server import torch before the first upload.
            self.sandbox = sandbox_features()
        except Exception:
            log.exception("sandbox_unknown")
        while not self._stopping.is_set():
            try:
                if self.run_once():
                    continue
            except Exception:
                log.exception("worker_failed")
            self._wake.wait(self.limits.poll_seconds)
            self._wake.clear()

    def run_once(self) -> bool:
        """Convert the oldest queued version; False when there is none."""
        if self._unsettled:
            self._recover((self.name,))
        elif time.monotonic() - self._looked > self.limits.stale_seconds / 4:
            self._recover()
        self._unsettled = True
        version = self.catalog.claim_next(self.name)
        if version is None:
            self._unsettled = False
            return False
        self._cancel = threading.Event()
        if self._stopping.is_set():
            self._cancel.set()
        scratch = self.scratch / self.name / uuid.uuid4().hex
        started = time.perf_counter()
        result = "ready"
        try:
            with io_errors("make a scratch folder"):
                scratch.mkdir(parents=True)
            with self._showing_life(version):
                self._walk(version, scratch)
            self._unsettled = False
        except Exception as error:
            if not isinstance(error, FoldserveError):
                log.exception("conversion_failed", model=version.model, version=version.version)
            if isinstance(error, DeviceLost):
                # Nothing can be prepared before the next start. The attempt counts, for the device
                # may be lost because of this very version.
                self.give_up()
                result = "interrupted"
                self._recover((self.name,))
            elif self._stopping.is_set():  # also what ending it led to, such as a cancelled load
                result = "interrupted"
                self._release(version)
            else:
                result = "rejected"
                self._reject(version, _as_refusal(error))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            seconds = time.perf_counter() - started
            self._durations[result].add(seconds)
            log.info(
                "conversion_finished",
                model=version.model,
                version=version.version,
                result=result,
                seconds=round(seconds, 3),
            )
        return True

    def _walk(self, version: VersionRecord, scratch: Path) -> None:
        source = self.blobs.open_path(version.checkpoint.sha256)
        result = run_sandboxed(
            "service.worker:convert_in_child",
            (str(source), version.config, str(scratch), self.limits.read),
            self.limits.child,
            scratch=scratch,
            readable=(source,),
            on_progress=self._progress(version),
            cancel=self._cancel,
        )
        conversion = pipeline.Conversion(**result)
        self._tell(version, "store")
        files = {kind: _inside(scratch, path) for kind, path in conversion.files.items()}
        artifacts = {kind: self.blobs.put_file(path).sha256 for kind, path in files.items()}
        self._tell(version, "prepare")
        execution = self.hooks.prepare(version, files)
        try:
            published = self.catalog.publish(
                version.model,
                version.version,
                form=conversion.form,
                architecture=conversion.architecture,
                fusion={**conversion.fusion, "execution": execution},
                artifacts=artifacts,
                servable="deploy_program" in artifacts,
                worker=self.name,
                present=self.blobs.exists,
            )
        except FoldserveError:
            self.hooks.abandoned(version)
            raise
        if published.servable:
            self.hooks.published(published)

    def _tell(self, version: VersionRecord, stage: str) -> None:
        progress = {"stage": stage, "done": 0, "total": 1}
        self.catalog.set_progress(version.model, version.version, progress, worker=self.name)

    def _progress(self, version: VersionRecord) -> Any:
        """Store progress, but not every block of a fast stage."""
        last: dict[str, Any] = {"stage": None, "at": 0.0}

        def tell(progress: Mapping[str, Any]) -> None:
            now = time.monotonic()
            finished = progress.get("done") == progress.get("total")
            soon = now - last["at"] < _PROGRESS_SECONDS
            if progress["stage"] == last["stage"] and soon and not finished:
                return
            last.update(stage=progress["stage"], at=now)
            self.catalog.set_progress(
                version.model, version.version, dict(progress), worker=self.name
            )

        return tell

    def _reject(self, version: VersionRecord, error: FoldserveError) -> None:
        log.info(
            "conversion_rejected",
            model=version.model,
            version=version.version,
            code=error.code(),
            detail=error.detail,
        )
        with self._settling(version):
            self.catalog.reject(version.model, version.version, error.to_dict(), worker=self.name)

    def _release(self, version: VersionRecord) -> None:
        log.info("conversion_released", model=version.model, version=version.version)
        with self._settling(version):
            self.catalog.release(version.model, version.version, worker=self.name)

    @contextmanager
    def _settling(self, version: VersionRecord) -> Iterator[None]:
        """Store an outcome. A catalog that cannot take it now is asked again in the next round."""
        try:
            yield
        except (ModelNotFound, VersionNotFound, Conflict):
            log.info("version_gone", model=version.model, version=version.version)
        self._unsettled = False

    @contextmanager
    def _showing_life(self, version: VersionRecord) -> Iterator[None]:
        """Tell the catalog again and again that the conversion goes on; end it if it was lost."""
        done = threading.Event()

        def tell() -> None:
            while not done.wait(self.limits.stale_seconds / 4):
                try:
                    self.catalog.show_life(version.model, version.version, worker=self.name)
                except (ModelNotFound, VersionNotFound, Conflict):
                    self._cancel.set()
                    return
                except StoreError as error:
                    log.warning("no_sign_of_life", detail=error.detail)

        thread = threading.Thread(target=tell, name="foldserve-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _as_refusal(error: Exception) -> FoldserveError:
    if isinstance(error, FoldserveError):
        return error
    if out_of_memory(error):
        return ConversionOutOfMemory("There is not enough memory to load it.")
    return ConversionCrashed(f"{type(error).__name__}: {error}")


def _inside(scratch: Path, path: str) -> Path:
    """A file that the child names, which must be one that it could write."""
    resolved = Path(path).resolve()
    if not resolved.is_relative_to(scratch.resolve()):
        raise ConversionCrashed("The conversion named a file outside its folder.")
    if not resolved.is_file():
        raise ConversionCrashed("The conversion named a file that is none.")
    return resolved


def convert_in_child(
    source: str,
    config: dict[str, Any],
    scratch: str,
    limits: ReadLimits,
    progress: pipeline.Progress,
) -> dict[str, Any]:
    """Runs in the child process: plain values in, plain values out."""
    checked = ModelConfig.from_json(json.dumps(config))
    conversion = pipeline.convert(Path(source), checked, Path(scratch), progress, limits)
    return {
        "form": conversion.form,
        "architecture": conversion.architecture,
        "fusion": conversion.fusion,
        "files": conversion.files,
    }
