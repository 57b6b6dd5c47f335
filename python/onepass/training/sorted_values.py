"""A sorted multiset of floats, in blocks: an insertion moves the values of one block only."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable

# sortedcontainers.SortedList works the same way; a dependency for one class would cost users more than these lines.
_BLOCK = 8192  # values, 64 KiB: the fastest with 1e6 values, or not far behind 4096 and 16384


class SortedValues:
    """Floats in ascending order. Adding or removing one of a million takes a few microseconds; each takes 8 bytes.

    ``add`` changes the number of values last, and ``remove`` first. So after an exception within either (Ctrl-C), the
    number is smaller than the owner expects.

    Args:
        values: The first values, in any order.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        ordered = array("d", sorted(values))
        self._blocks = [ordered[i : i + _BLOCK] for i in range(0, len(ordered), _BLOCK)]  # none is empty
        self._largest = [block[-1] for block in self._blocks]
        self._count = len(ordered)

    def __len__(self) -> int:
        return self._count

    def add(self, value: float) -> None:
        """Add a value."""
        if not self._blocks:
            self._blocks, self._largest = [array("d", [value])], [value]
            self._count = 1
            return
        i = min(bisect_left(self._largest, value), len(self._blocks) - 1)
        block = self._blocks[i]
        insort(block, value)
        if len(block) > 2 * _BLOCK:
            self._blocks[i : i + 1] = block[:_BLOCK], block[_BLOCK:]
            self._largest.insert(i, block[_BLOCK - 1])
            i += 1
        self._largest[i] = self._blocks[i][-1]
        self._count += 1

    def remove(self, value: float) -> None:
        """Remove a value once. It must be there."""
        self._count -= 1
        i = bisect_left(self._largest, value)
        block = self._blocks[i]
        del block[bisect_left(block, value)]
        # A small block joins the one after it, or many removals would leave many small blocks.
        if i + 1 < len(self._blocks) and len(block) + len(self._blocks[i + 1]) <= _BLOCK:
            self._blocks[i + 1] = block + self._blocks[i + 1]
            block = array("d")
        if block:
            self._largest[i] = block[-1]
        else:
            del self._blocks[i], self._largest[i]

    def percentile(self, percent: float) -> float:
        """Return a percentile, interpolated linearly between the two nearest values, as ``numpy.percentile``.

        There must be a value.

        Args:
            percent: In [0, 100].
        """
        rank = (self._count - 1) * percent / 100
        i, index = self._find(int(rank))
        block = self._blocks[i]
        low = high = block[index]
        if index + 1 < len(block):
            high = block[index + 1]
        elif i + 1 < len(self._blocks):
            high = self._blocks[i + 1][0]
        return low + (high - low) * (rank - int(rank))

    def _find(self, rank: int) -> tuple[int, int]:
        """Return the block that has the value of a rank, and the index there. Search from the nearer end."""
        if 2 * rank < self._count:
            i = 0
            while rank >= len(self._blocks[i]):
                rank -= len(self._blocks[i])
                i += 1
            return i, rank
        i, rank = len(self._blocks), rank - self._count
        while rank < 0:
            i -= 1
            rank += len(self._blocks[i])
        return i, rank
