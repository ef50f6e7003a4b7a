from __future__ import annotations

from service.serving import Tallied, Tally


def test_a_bound_belongs_to_its_bucket_and_buckets_are_cumulative() -> None:
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        tally.add(value)
    tally.add(2.0, times=3)
    assert tally.read() == Tallied((1.0, 2.0), (2, 6), count=7, total=18.0)


def test_an_empty_tally_counts_nothing() -> None:
    assert Tally((1.0,)).read() == Tallied((1.0,), (0,), count=0, total=0.0)
