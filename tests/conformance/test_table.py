"""Every conformance case through the engine: errors, counts and deploy tensors; none is skipped."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.conformance.measure import Counts, measure
from tests.networks import cases

NAMES = cases.names("")


@cases.needs_cases
def test_no_case_is_left_out() -> None:
    assert len(NAMES) == len(list(cases.FOLDER.glob("*.json"))) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_case_is_converted_at_least_as_well_as_officially(name: str) -> None:
    assert list(measure(name).failures()) == []


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
