"""Folders of workers, each locked while its process lives: so a start can tell who is dead.

    <root>/<worker>/lock    an exclusive flock, held by the worker
    <root>/<worker>/...     files of its conversion

The lock goes with the process, however it ends, and works between processes of one machine. What
happens to workers of other machines is decided by their signs of life in the catalog.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.store.files import io_errors, make_folder

_LOCK = "lock"


class Lease:
    """A worker's own folder and the proof that the worker lives."""

    def __init__(self, root: Path, name: str) -> None:
        """Make and lock `<root>/<name>`. Raises StoreError or StorageFull."""
        self.folder = root / name
        with io_errors(f"make {self.folder}"):
            make_folder(root)
            with _alone(root):
                make_folder(self.folder)  # durable: after a power cut it tells who was at work
                self._file = open(self.folder / _LOCK, "xb")  # noqa: SIM115  held until `close`
                fcntl.flock(self._file, fcntl.LOCK_EX)

    def close(self) -> None:
        """Give the folder up, with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._file.close()


def dead_workers(root: Path) -> tuple[str, ...]:
    """Names of the workers whose folders nobody holds any more."""
    with io_errors(f"look through {root}"):
        make_folder(root)
        with _alone(root):
            return tuple(sorted(path.name for path in root.iterdir() if not _held(path)))


def remove(root: Path, names: tuple[str, ...]) -> None:
    """Remove the folders of dead workers."""
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)
        with suppress(OSError):
            (root / name).unlink()  # a file that was no folder


def _held(folder: Path) -> bool:
    try:
        with open(folder / _LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Between a folder's making and its locking nobody may look."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
