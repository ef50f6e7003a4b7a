from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.machines.machine import Machine, compiler, machine


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine for all tests of a session; each test uses data folders of its own."""
    if compiler() is None:
        pytest.skip("no C compiler here, and the shim that plays faults has to be compiled")
    with machine(tmp_path_factory.mktemp("machine")) as made:
        yield made
