"""Files and folders that are whole or not there, and stay when the power goes."""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from service.errors import FoldserveError, StorageFull, StoreError

BUFFER_BYTES = 1 << 20
"""Bytes collected in memory before they are written."""

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """An open, locked, randomly named file that is gone afterwards unless it was renamed."""
    while True:
        path = folder / uuid.uuid4().hex
        file = open(path, "xb", buffering=BUFFER_BYTES)  # noqa: SIM115  closed below
        fcntl.flock(file, fcntl.LOCK_EX)
        # A sweep may have taken the file between its creation and our lock: then make another.
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()
    try:
        yield file, path
    finally:
        with suppress(OSError):  # gone already, or a failing disk: then it is swept later
            path.unlink()
        with suppress(OSError):  # a full disk shows again at the flush that closing does
            file.close()


@contextmanager
def io_errors(action: str) -> Iterator[None]:
    """Turn operating-system errors into the store's own."""
    try:
        yield
    except FoldserveError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(f"Could not {action}: {error.strerror}.") from error
        raise StoreError(f"Could not {action}: {error}.") from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durable in the one that holds it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make names that were added, renamed or removed in a folder last. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
