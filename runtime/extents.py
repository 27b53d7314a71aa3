"""Which bytes of one arena belong to which block: best fit, coalescing, compaction. Floor 0.

Knows offsets and sizes only, all multiples of 4096 bytes; it never touches the memory.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from .format import PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes that move towards the start of the arena; source and target may overlap."""

    source: int
    target: int
    num_bytes: int


class Extents:
    """Blocks and free extents of an arena of `num_bytes`."""

    def __init__(self, num_bytes: int) -> None:
        _check(num_bytes)
        self._num_bytes = num_bytes
        self._blocks: dict[int, int] = {}  # offset -> bytes
        self._free_by_start: dict[int, int] = {}  # start -> end
        self._free_by_end: dict[int, int] = {}  # end -> start
        self._used_bytes = 0
        if num_bytes:
            self._add_free(0, num_bytes)

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        return self._num_bytes - self._used_bytes

    def blocks(self) -> list[tuple[int, int]]:
        """(offset, bytes) of every block, in address order."""
        return sorted(self._blocks.items())

    def allocate(self, num_bytes: int, below: int | None = None) -> int | None:
        """Take the smallest free extent that holds the bytes (the first of equals).

        `below`: the block must end at or before this offset. Returns the block's offset, or None
        where no single extent will do.
        """
        _check(num_bytes)
        if not num_bytes:
            raise ValueError("a block needs at least one page")
        best: tuple[int, int] | None = None
        for start, end in self._free_by_start.items():
            if end - start < num_bytes or (below is not None and start + num_bytes > below):
                continue
            if best is None or (end - start, start) < best:
                best = end - start, start
        if best is None:
            return None
        size, start = best
        self._remove_free(start, start + size)
        if size > num_bytes:
            self._add_free(start + num_bytes, start + size)
        self._blocks[start] = num_bytes
        self._used_bytes += num_bytes
        return start

    def free(self, offset: int) -> int:
        """Give a block back; returns its bytes. KeyError where no block starts at `offset`."""
        num_bytes = self._blocks.pop(offset)
        self._used_bytes -= num_bytes
        start, end = offset, offset + num_bytes
        if start in self._free_by_end:
            before = self._free_by_end[start]
            self._remove_free(before, start)
            start = before
        if end in self._free_by_start:
            after = self._free_by_start[end]
            self._remove_free(end, after)
            end = after
        self._add_free(start, end)
        return num_bytes

    def plan(self, num_bytes: int, fixed: Collection[int] = ()) -> list[Move] | None:
        """The cheapest moves after which one free extent holds `num_bytes`, or None.

        `fixed` holds the offsets of blocks that may not move. The moves are in the order in which
        they can be carried out one by one. An empty list: no move is needed.
        """
        blocks = self.blocks()
        count = len(blocks)
        starts = np.array([start for start, _ in blocks], dtype=np.int64)
        sizes = np.array([size for _, size in blocks], dtype=np.int64)
        # gaps[i] lies before block i, gaps[count] behind the last. A window (i, j) joins the gaps
        # i .. j by moving the blocks i .. j-1 between them.
        edges = np.concatenate(([0], starts + sizes))
        gaps = np.concatenate((starts, [self._num_bytes])) - edges
        gap_sum = np.concatenate(([0], np.cumsum(gaps)))
        moved_sum = np.concatenate(([0], np.cumsum(sizes)))
        is_fixed = np.array([start in fixed for start, _ in blocks], dtype=np.int64)
        fixed_sum = np.concatenate(([0], np.cumsum(is_fixed)))
        first = np.arange(count + 1)
        last = np.searchsorted(gap_sum[1:], gap_sum[:-1] + num_bytes)
        last = np.maximum(last, first)
        possible = last <= count
        last = np.minimum(last, count)
        possible &= fixed_sum[last] == fixed_sum[first]
        if not possible.any():
            return None
        cost = np.where(possible, moved_sum[last] - moved_sum[first], np.iinfo(np.int64).max)
        begin = int(cost.argmin())
        moves = []
        target = int(edges[begin])
        for start, size in blocks[begin : int(last[begin])]:
            if start != target:
                moves.append(Move(start, target, size))
            target += size
        return moves

    def apply(self, moves: list[Move]) -> None:
        """Record moves that the owner of the memory has carried out, in their order."""
        for move in moves:
            num_bytes = self._blocks[move.source]
            if num_bytes != move.num_bytes or move.target > move.source:
                raise ValueError(f"{move} does not describe a block of {num_bytes} bytes")
            self.free(move.source)
            self._place(move.target, num_bytes)

    def resize(self, num_bytes: int) -> None:
        """Move the arena's end. ValueError where a block lies beyond the new end."""
        _check(num_bytes)
        old = self._num_bytes
        if num_bytes > old:
            start = self._free_by_end.get(old, old)
            if start < old:
                self._remove_free(start, old)
            self._add_free(start, num_bytes)
        elif num_bytes < old:
            start = self._free_by_end.get(old, old)
            if start > num_bytes:
                raise ValueError(f"a block lies beyond {num_bytes} bytes")
            self._remove_free(start, old)
            if start < num_bytes:
                self._add_free(start, num_bytes)
        self._num_bytes = num_bytes

    def _place(self, offset: int, num_bytes: int) -> None:
        for start, end in self._free_by_start.items():
            if start <= offset and offset + num_bytes <= end:
                break
        else:
            raise ValueError(f"{num_bytes} bytes at {offset} are not free")
        self._remove_free(start, end)
        if start < offset:
            self._add_free(start, offset)
        if offset + num_bytes < end:
            self._add_free(offset + num_bytes, end)
        self._blocks[offset] = num_bytes
        self._used_bytes += num_bytes

    def _add_free(self, start: int, end: int) -> None:
        self._free_by_start[start] = end
        self._free_by_end[end] = start

    def _remove_free(self, start: int, end: int) -> None:
        del self._free_by_start[start]
        del self._free_by_end[end]


def _check(num_bytes: int) -> None:
    if num_bytes < 0 or num_bytes % PAGE_BYTES:
        raise ValueError(f"{num_bytes} bytes are not a multiple of {PAGE_BYTES}")
