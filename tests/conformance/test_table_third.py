"""The third part of the conformance table; see `parts`."""

from __future__ import annotations

import pytest

from tests.conformance import parts


@pytest.mark.parametrize("name", parts.part(2))
def test_a_case_is_converted_at_least_as_well_as_officially(name: str) -> None:
    parts.check(name)
