"""The shared memory: its blocks never overlap, and nobody can shrink it."""

from __future__ import annotations

import mmap
import os
import random

import pytest

from service.relay import memory
from service.relay.memory import Blocks

PAGE = mmap.PAGESIZE


def test_blocks_never_overlap_and_come_back() -> None:
    chance = random.Random(1)
    size = 64 * PAGE
    blocks = Blocks(size)
    taken: dict[int, int] = {}
    refused = 0
    for _ in range(4000):
        if taken and chance.random() < 0.48:
            begin = chance.choice(sorted(taken))
            blocks.give_back(begin)
            del taken[begin]
            continue
        wanted = chance.randint(1, 9 * PAGE)
        begin = blocks.take(wanted)
        if begin is None:
            refused += 1
            continue
        assert begin % PAGE == 0
        assert begin + wanted <= size
        assert all(begin + wanted <= at or at + used <= begin for at, used in taken.items())
        taken[begin] = wanted
    assert refused, "the memory was never full, so nothing was tested"
    for begin in taken:
        blocks.give_back(begin)
    assert blocks.taken == 0
    assert blocks.take(size) == 0, "the gaps did not become one again"


def test_a_block_that_is_not_taken_cannot_be_given_back() -> None:
    blocks = Blocks(4 * PAGE)
    begin = blocks.take(PAGE)
    assert begin is not None
    blocks.give_back(begin)
    with pytest.raises(KeyError):
        blocks.give_back(begin)


def test_everybody_sums_what_each_counts() -> None:
    descriptor = memory.create(3 * 8)
    try:
        ours, theirs = memory.Tally(descriptor), memory.Tally(descriptor)
        ours[0], theirs[2] = 5, 7
        assert (ours.total, theirs.total) == (12, 12)
        assert [ours.is_above_mean(index) for index in range(3)] == [True, False, True]
        ours[0] = 0
        assert theirs.total == 7
    finally:
        os.close(descriptor)


def test_the_memory_is_seen_by_both_sides_and_keeps_its_size() -> None:
    descriptor = memory.create(4 * PAGE)
    try:
        ours, theirs = memory.writable(descriptor), memory.readable(descriptor)
        ours[PAGE : PAGE + 3] = b"abc"
        assert theirs[PAGE : PAGE + 3] == b"abc"
        with pytest.raises(TypeError):
            theirs[0:1] = b"x"
        for size in (PAGE, 8 * PAGE):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
