"""Starting children from multiprocessing's fork server without importing the main module again.

A fork server imports torch once; each child is then a fork of it, ready in about 0.1 s. The
service itself must not fork: it has threads, and its memory holds more than a child should see.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import (
    context,
    forkserver,
    popen_forkserver,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.context import set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any

PRELOAD = ("service.checkpoint.preload",)
"""Modules that the fork server imports when it starts."""

_KEPT = frozenset({"PATH", "HOME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV"})
_KEPT_PREFIXES = (
    *("LC_", "LD_", "PYTHON", "MALLOC_", "GLIBC_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_"),
    *("ATEN_", "TORCH", "DNNL_", "ONEDNN_"),
)

_starting = threading.Lock()
_wanted = dict.fromkeys(PRELOAD)  # a set that keeps its order


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Popen(popen_forkserver.Popen):
    """As its base, but the child is not told what the main module is.

    The base has every child run the service's own start script again, as `__mp_main__`: that
    takes seconds, and hands code to the child that it has no use for.
    """

    def _launch(self, process_obj: BaseProcess) -> None:
        preparation = spawn.get_preparation_data(process_obj.name)
        for key in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(key, None)
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            set_spawning_popen(None)
        self.sentinel, writer = forkserver.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        kept = os.dup(writer)  # its end tells the child that the parent is gone
        self.finalizer = util.Finalize(self, _close, (kept, self.sentinel))
        with open(writer, "wb", closefd=True) as file:
            file.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class ChildProcess(context.ForkServerProcess):
    """A process forked from the fork server."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:  # noqa: N802  multiprocessing's own hook
        return _Popen(process_obj)


def start_fork_server(preload: Sequence[str] = ()) -> None:
    """Start the fork server, if it is not running, with `PRELOAD` and `preload` imported.

    Only what is named before the first start is preloaded. Returns at once; the first child waits
    for the imports.
    """
    with _starting:
        _wanted.update(dict.fromkeys(preload))
        forkserver.set_forkserver_preload(list(_wanted))
        with _clean_start():
            forkserver.ensure_running()


def end_fork_server() -> None:
    """Kill the fork server and the resource tracker that it came with, and wait for their end.

    They end by themselves with the process, but one that execs keeps its children and would never
    hear of their end. Killed, because each waits for whoever still holds its pipe.
    """
    helpers: tuple[tuple[Any, str], ...] = (
        (vars(forkserver)["_forkserver"], "_forkserver_pid"),
        (vars(resource_tracker)["_resource_tracker"], "_pid"),
    )
    with _starting:
        for helper, pid in helpers:
            if (running := getattr(helper, pid)) is not None:
                os.kill(running, signal.SIGKILL)
                helper._stop()


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a child may know of the service's environment: paths, language, threads.

    Addresses with passwords, API keys and cloud credentials stay behind. They must never have been
    there: a process can read its first environment again however often it is cleared.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES)
    }


@contextmanager
def _clean_start() -> Iterator[None]:
    """Have multiprocessing start its helpers in a clean environment, which it cannot be asked to.

    Only for the fork server and the resource tracker: neither starts otherwise while this holds.
    """
    original = util.spawnv_passfds

    def spawn_clean(path: bytes, args: Sequence[Any], passfds: Sequence[int]) -> int:
        process = subprocess.Popen(
            args,
            executable=path,
            pass_fds=passfds,
            env=clean_environment(os.environ),
        )
        process.returncode = 0  # multiprocessing waits for it itself
        return process.pid

    util.spawnv_passfds = spawn_clean
    try:
        yield
    finally:
        util.spawnv_passfds = original
