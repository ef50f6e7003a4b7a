"""Shared memory: anonymous, of a fixed size, and divided into blocks by the side that writes."""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import insort


def create(size: int) -> int:
    """A descriptor of `size` bytes that no process can make larger or smaller (Linux only).

    It has no name, so nobody else can open it, and it is gone with the last process that holds it.
    Its pages take memory once they are written. Were it to shrink, reading it would be a fault.
    """
    descriptor = os.memfd_create("foldserve-bodies", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def writable(descriptor: int) -> mmap.mmap:
    """The memory of `create`, to write to."""
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size)


def readable(descriptor: int) -> mmap.mmap:
    """The memory of `create`, to read only."""
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size, prot=mmap.PROT_READ)


class Tally:
    """One number for each of several processes, which each changes its own of and all can sum.

    `descriptor` is memory of `create` with 8 bytes for each.
    """

    def __init__(self, descriptor: int) -> None:
        self._numbers = memoryview(writable(descriptor)).cast("q")

    def __setitem__(self, index: int, value: int) -> None:
        self._numbers[index] = value

    @property
    def total(self) -> int:
        """The sum, in which what happens at this very moment may be missing."""
        return sum(self._numbers)

    def is_above_mean(self, index: int) -> bool:
        """Whether that number is larger than the mean of all."""
        return self._numbers[index] * len(self._numbers) > self.total


class Blocks:
    """Which parts of `size` bytes are taken: the first gap that fits, in whole pages."""

    def __init__(self, size: int) -> None:
        self._gaps = [(0, size)] if size else []  # begin and end, in order, no two touching
        self._ends: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """Where a block of at least `size` bytes begins; None when there is no such gap."""
        pages = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
        for index, (begin, end) in enumerate(self._gaps):
            if end - begin >= pages:
                self._gaps[index : index + 1] = (
                    [(begin + pages, end)] if end > begin + pages else []
                )
                self._ends[begin] = begin + pages
                return begin
        return None

    def give_back(self, begin: int) -> None:
        """Free the block that begins there. Raises KeyError when there is none."""
        end = self._ends.pop(begin)
        insort(self._gaps, (begin, end))
        joined: list[tuple[int, int]] = []
        for gap in self._gaps:
            if joined and joined[-1][1] == gap[0]:
                joined[-1] = (joined[-1][0], gap[1])
            else:
                joined.append(gap)
        self._gaps = joined

    @property
    def taken(self) -> int:
        """How many blocks are taken."""
        return len(self._ends)
