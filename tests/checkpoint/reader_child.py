"""A process that reads one file after another as the service does, confined, and tells how it went.

It takes a path a line and answers with a JSON line: the code of the refusal ("ok" for none,
"crash: ..." for an exception that is none of ours), the seconds of CPU time, and the memory in
bytes that the reading added at its peak to what the process held before.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

from service import pipeline
from service.checkpoint import ReadLimits, preload, read_checkpoint, sandbox  # noqa: F401  as the service does
from service.errors import FoldserveError
from service.graph import load_program
from service.networks import recognise

_GIB = 1 << 30


def read_all(path: Path) -> None:
    """Everything that a file goes through before the weights are computed with."""
    limits = ReadLimits()
    checkpoint = read_checkpoint(path, limits)
    if checkpoint.bundle is not None:
        load_program(checkpoint.bundle)
    elif checkpoint.archive is not None:
        pipeline.exported(checkpoint.archive, limits)
    else:
        recognise(checkpoint.state)


def misbehave(name: str) -> bool:
    """What the tests plant, to see that it is seen."""
    match name:
        case "planted-hog":
            bytearray(400 << 20)
        case "planted-crash":
            ctypes.string_at(0)
        case "planted-error":
            raise ZeroDivisionError
        case "planted-hang":
            time.sleep(600)
        case _:
            return False
    return True


class Memory:
    """Resident memory of this process, by descriptors that were opened before the confinement."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def now(self) -> int:
        return self._field(b"VmRSS:")

    def peak(self) -> int:
        return self._field(b"VmHWM:")

    def forget_peak(self) -> None:
        os.write(self._reset, b"5")

    def _field(self, name: bytes) -> int:
        text = os.pread(self._status, 8192, 0)
        return int(text.split(name)[1].split()[0]) * 1024


def outcome(path: Path, memory: Memory) -> dict[str, object]:
    memory.forget_peak()
    before, started = memory.now(), time.process_time()
    try:
        if not misbehave(path.name):
            read_all(path)
        code = "ok"
    except FoldserveError as error:
        code = error.code()
        json.dumps(error.to_dict(), allow_nan=False, ensure_ascii=False).encode()
    except BaseException as error:
        traceback.print_exc()
        code = f"crash: {type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - started
    return {"code": code, "seconds": seconds, "bytes": memory.peak() - before}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    memory = Memory()
    sandbox.confine(
        folder, memory_bytes=8 * _GIB, cpu_seconds=3600, file_bytes=_GIB, readable=[folder]
    )
    for line in sys.stdin:
        print(json.dumps(outcome(Path(line.rstrip("\n")), memory)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
