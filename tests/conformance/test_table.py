"""Every conformance case through the engine: errors, counts and deploy tensors; none is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conformance import parts
from tests.conformance.measure import Counts, measure
from tests.networks import cases


@cases.needs_cases
def test_no_case_is_left_out() -> None:
    dealt = [name for number in range(parts.PARTS) for name in parts.part(number)]
    assert sorted(dealt) == sorted(path.stem for path in cases.FOLDER.glob("*.json"))
    assert dealt
    assert set(parts.NETWORKS) <= set(dealt)


@pytest.mark.parametrize("name", parts.part(0))
def test_a_case_is_converted_at_least_as_well_as_officially(name: str) -> None:
    parts.check(name)


@cases.needs_cases
def test_a_worse_conversion_fails() -> None:
    row = measure("blk_dbb_k3")
    assert row.official is not None
    assert not list(row.failures())
    more = Counts(row.official.convolutions + 1, row.official.macs + 1)
    assert len(list(replace(row, after=more).failures())) == 2
    assert list(replace(row, float64=2e-10).failures())
    assert list(replace(row, float64=float("nan")).failures())
    assert list(replace(row, float32=11 * row.noise).failures())
    assert list(replace(row, tensors=1e-5).failures())
    assert list(replace(row, tensors=None).failures())
