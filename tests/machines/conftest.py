from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.machines.machine import Machine, compiler, machine

_MEMORY = Path("/dev/shm")
_ENOUGH = 1 << 30


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine for all tests of a session; each test uses data folders of its own."""
    if compiler() is None:
        pytest.skip("no C compiler here, and the shim that plays faults has to be compiled")
    # A power cut is played by the shim, so memory is as good a disk, and far faster to sync.
    roomy = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ENOUGH
    disk = _MEMORY if roomy else tmp_path_factory.mktemp("machine")
    with TemporaryDirectory(dir=disk, prefix="machine-") as folder, machine(Path(folder)) as made:
        yield made
