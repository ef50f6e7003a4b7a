"""Running a function on hostile input in a child that can take nothing down with it.

The parent believes nothing that the child says: what comes back is JSON lines over a pipe, never
pickles, bounded in size and number, and read without ever waiting for the child to go on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from service.checkpoint import sandbox
from service.checkpoint.launch import ChildProcess, start_fork_server
from service.errors import (
    ConversionCrashed,
    ConversionInterrupted,
    ConversionOutOfMemory,
    ConversionTimeout,
    FoldserveError,
    StorageFull,
    out_of_memory,
)

Progress = Callable[[dict[str, Any]], None]

# multiprocessing looks after all its children whenever one starts, without a lock of its own.
_PROCESS_TABLE = threading.Lock()

_POLL_SECONDS = 0.1
_READ_BYTES = 1 << 16
_MESSAGE_BYTES = 4 << 20
_MAX_MESSAGES = 10_000
_STDERR = 2
_PATIENCE = 5
_DISK_FULL = ("no space left on device", "disk quota exceeded")


@dataclass(frozen=True)
class ChildLimits:
    """What a child may take.

    Attributes:
        seconds: wall-clock time from start to result.
        cpu_seconds: processor time of all its threads together.
        memory_bytes: memory it may add to what a fresh child holds (about 80 MB).
        file_bytes: the longest file it may write.
        threads: threads that torch may compute with.
        nice: added to the service's own niceness, so that conversions never starve inference.
        idle: run only when no other process wants the processor or the disk.
        scratch_bytes, scratch_files: what it may leave in its folder, all files together.

    Conversions are background work. With the lowest niceness, the idle policy of the scheduler and
    one thread, a child takes what serving leaves over. `seconds` therefore leaves out time in which
    it was ready to run and others ran, up to `_PATIENCE` times as long again.
    """

    seconds: float = 600.0
    cpu_seconds: int = 1200
    memory_bytes: int = 8 << 30
    file_bytes: int = 8 << 30
    threads: int = 1
    nice: int = 0
    idle: bool = False
    scratch_bytes: int = 32 << 30
    scratch_files: int = 10_000


def run_sandboxed(
    target: str,
    args: Sequence[Any],
    limits: ChildLimits | None = None,
    on_progress: Progress | None = None,
    *,
    scratch: Path,
    readable: Sequence[Path] | None = None,
    cancel: threading.Event | None = None,
) -> Any:
    """Call `target` ("module:function") in a confined child and return its result.

    The function is called as `function(*args, progress)`; `args` must be picklable, what it gives
    to `progress` (a dict) and returns must be JSON-able. `on_progress` is called with those dicts
    in the calling thread; whatever it raises ends the child and is raised here. `scratch` is an
    existing folder, the child's folder for temporary files and the only place it may write.
    With `readable` it may read those files and folders, `scratch`, and what belongs to the system
    and to Python, but no other data (the catalog, other blobs); with None, whatever it finds.
    Setting `cancel` ends the child within 0.1 s.

    Safe to call from any thread. Raises the FoldserveError that the function raised;
    ConversionCrashed for any other exception or a death by signal; ConversionOutOfMemory;
    ConversionTimeout for wall-clock or processor time; ConversionInterrupted when cancelled.
    """
    limits = limits or ChildLimits()
    start_fork_server()
    kills_before = _kernel_kills()
    reader, writer = Pipe(duplex=False)
    process = ChildProcess(
        target=_child,
        args=(writer, target, tuple(args), limits, scratch.absolute(), readable),
        daemon=True,
    )
    conversation = _Conversation(reader, process, limits, scratch, on_progress, cancel)
    try:
        with writer, _PROCESS_TABLE:
            process.start()
        conversation.hold()
    finally:
        with _PROCESS_TABLE:
            if process.pid is not None:
                process.kill()
                process.join()
            code = process.exitcode
            process.close()
        reader.close()
    return conversation.outcome(code, kernel_killed=_kernel_kills() > kills_before)


@functools.cache
def sandbox_features() -> dict[str, bool]:
    """Which measures of `service.checkpoint.sandbox` are active in children on this machine.

    Asks a real child the first time, which also starts the fork server (a few seconds).
    """
    with tempfile.TemporaryDirectory() as scratch:
        found: Mapping[str, Any] = run_sandboxed(
            "service.checkpoint.child:report_features", (), scratch=Path(scratch)
        )
    return {name: found.get(name) is True for name in sandbox.FEATURES}


# ---- in the parent -----------------------------------------------------------------------------


class _Conversation:
    """Listening to one child until it is done, dead, over a limit or cancelled."""

    def __init__(
        self,
        reader: Connection[Any, Any],
        process: ChildProcess,
        limits: ChildLimits,
        scratch: Path,
        on_progress: Progress | None,
        cancel: threading.Event | None,
    ) -> None:
        self._reader = reader
        self._process = process
        self._limits = limits
        self._scratch = scratch
        self._on_progress = on_progress
        self._cancel = cancel
        self._pending = bytearray()
        self._messages = 0
        self._answer: dict[str, Any] | None = None
        self._fault: FoldserveError | None = None

    def hold(self) -> None:
        """Pass progress on until there is an answer, a fault, or nothing more to come."""
        deadline = time.monotonic() + self._limits.seconds
        patience = _PATIENCE * self._limits.seconds
        look_again = 0.0
        ceiling = self._limits.memory_bytes + _resident_bytes(self._process.pid)
        while self._answer is None and self._fault is None:
            ready = self._reader.poll(_POLL_SECONDS)
            if ready and not self._read():
                return
            if (now := time.monotonic()) < look_again:
                continue
            look_again = now + _POLL_SECONDS
            if self._cancel is not None and self._cancel.is_set():
                self._fault = ConversionInterrupted("The conversion was cancelled.")
            elif now > deadline + min(_waited_seconds(self._process.pid), patience):
                self._fault = ConversionTimeout(
                    f"The conversion took longer than {self._limits.seconds:g} s."
                )
            # Beside the child's own limit: memory that is shared or mapped counts here.
            elif _resident_bytes(self._process.pid) > ceiling:
                self._fault = self._out_of_memory()
            elif not _holds_at_most(
                self._scratch, self._limits.scratch_bytes, self._limits.scratch_files
            ):
                self._fault = ConversionCrashed("The conversion filled its folder.")

    def outcome(self, code: int | None, *, kernel_killed: bool) -> Any:
        """The result, or the error that tells why there is none."""
        if self._fault is not None:
            raise self._fault
        if self._answer is not None:
            if "result" in self._answer:
                return self._answer["result"]
            raise _error_of(self._answer.get("error"))
        if code == -signal.SIGXCPU:
            raise ConversionTimeout(
                f"The conversion used more than {self._limits.cpu_seconds} s of processor time."
            )
        if code == -signal.SIGKILL and kernel_killed:
            raise self._out_of_memory()
        how = (
            f"by signal {signal.Signals(-code).name}" if code and code < 0 else f"with code {code}"
        )
        raise ConversionCrashed(f"The conversion process ended {how} and gave no result.")

    def _read(self) -> bool:
        """Take what is there; False at the end of the pipe."""
        data = os.read(self._reader.fileno(), _READ_BYTES)
        # Only the new bytes are searched, so that a long line costs no more than its length.
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._pending += line
            message, self._pending = bytes(self._pending), bytearray()
            self._take(message)
            if self._answer is not None or self._fault is not None:
                return True
        self._pending += rest
        if len(self._pending) > _MESSAGE_BYTES or self._messages > _MAX_MESSAGES:
            self._fault = ConversionCrashed("The conversion process said more than is listened to.")
        return bool(data)

    def _take(self, line: bytes) -> None:
        self._messages += 1
        try:
            message = json.loads(line)
            # No NaN and no half characters: neither could be stored or sent on.
            json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            message = None
        match message:
            case {"progress": dict(progress)}:
                if self._on_progress is not None:
                    self._on_progress(progress)
            case {"result": _} | {"error": dict()}:
                self._answer = message
            case _:
                self._fault = ConversionCrashed("The conversion process said nothing sensible.")

    def _out_of_memory(self) -> ConversionOutOfMemory:
        return ConversionOutOfMemory(
            f"The conversion needed more than {self._limits.memory_bytes} bytes of memory."
        )


def _error_of(data: Any) -> FoldserveError:
    try:
        return FoldserveError.from_dict(data)
    except (TypeError, AttributeError):
        return ConversionCrashed("The conversion process reported an error that cannot be read.")


def _resident_bytes(pid: int | None) -> int:
    """Resident memory of a process, 0 when it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _waited_seconds(pid: int | None) -> float:
    """How long a process was ready to run while others ran, in seconds; 0 where nobody counts."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _holds_at_most(folder: Path, most_bytes: int, most_files: int) -> bool:
    """Whether the files below `folder` keep within both; what changes meanwhile is left out."""
    waiting = [folder]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                most_files -= 1
                with contextlib.suppress(OSError):
                    most_bytes -= entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry))
                if most_files < 0 or most_bytes < 0:
                    return False
    return True


def _kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory since the machine started."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


# ---- in the child ------------------------------------------------------------------------------

_active: dict[str, bool] = {}


def report_features(_progress: Progress) -> dict[str, bool]:
    """What `confine` achieved in this child."""
    return _active


def _child(
    writer: Connection[Any, Any],
    target: str,
    args: tuple[Any, ...],
    limits: ChildLimits,
    scratch: Path,
    readable: Sequence[Path] | None,
) -> None:
    """The child's whole life. It ends here: nothing that was forked along runs at exit."""
    code = 1
    try:
        answer = _answer(writer, target, args, limits, scratch, readable)
        _send(writer, answer)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _answer(
    writer: Connection[Any, Any],
    target: str,
    args: tuple[Any, ...],
    limits: ChildLimits,
    scratch: Path,
    readable: Sequence[Path] | None,
) -> dict[str, Any]:
    try:
        _settle(writer, limits, scratch, readable)
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        result = {"result": function(*args, lambda data: _send(writer, {"progress": data}))}
        _encode(result)  # a result that is no JSON is the function's fault: said here
        return result
    except FoldserveError as error:
        return {"error": _jsonable(error)}
    except Exception as error:
        text = str(error)
        if out_of_memory(error):
            kind: type[FoldserveError] = ConversionOutOfMemory
            text = f"The conversion needed more than {limits.memory_bytes} bytes of memory."
        elif any(message in text.lower() for message in _DISK_FULL):
            kind, text = StorageFull, f"The conversion could not be written: {_plain(text[:500])}"
        else:
            traceback.print_exc()
            kind, text = ConversionCrashed, f"{type(error).__name__}: {_plain(text[:500])}"
        return {"error": kind(text, exception=type(error).__name__).to_dict()}


def _settle(
    writer: Connection[Any, Any],
    limits: ChildLimits,
    scratch: Path,
    readable: Sequence[Path] | None,
) -> None:
    """Make this process ready for hostile input; see `service.checkpoint.sandbox`."""
    sandbox.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Whatever multiprocessing and the fork server had open. Their pipe to the service in
    # particular: while a child holds it, the fork server outlives the service.
    os.closerange(_STDERR + 1, writer.fileno())
    most = os.sysconf("SC_OPEN_MAX")
    os.closerange(writer.fileno() + 1, most if most > 0 else 1 << 16)
    os.nice(limits.nice)
    if limits.idle:
        sandbox.step_back()
    # The working folder stays: paths relative to it that the service passed on keep their meaning.
    os.umask(0o077)
    for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = str(scratch)
    # PyTorch names folders after the user, and the list of users is not for a child to read.
    os.environ.setdefault("LOGNAME", "foldserve")
    tempfile.tempdir = None
    torch = importlib.import_module("torch")
    torch.set_num_threads(limits.threads)
    _active.update(
        sandbox.confine(
            scratch,
            memory_bytes=limits.memory_bytes,
            cpu_seconds=limits.cpu_seconds,
            file_bytes=limits.file_bytes,
            readable=None if readable is None else [Path(path) for path in readable],
        )
    )


def _send(writer: Connection[Any, Any], message: dict[str, Any]) -> None:
    view = memoryview(_encode(message))
    while view:
        view = view[os.write(writer.fileno(), view) :]


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _jsonable(error: FoldserveError) -> dict[str, Any]:
    data = error.to_dict()
    try:
        _encode(data)
    except (TypeError, ValueError):
        data = {key: _plain(str(value)) for key, value in data.items()}
    return data


def _plain(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
