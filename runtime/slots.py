"""Where each resident record lies in the arena: gives memory, takes it back, moves. Floor 0.

Knows nothing of demand: who may be evicted or moved is decided by the expert cache.
"""

from collections.abc import Collection, Sequence

import numpy as np

from .extents import Extents, Move
from .io import ABSENT, READING, READY
from .memory import Arena


class Slots:
    """`capacity_bytes` of `arena`, in extents of whole pages, for records of these sizes.

    `status` is the reader's, by key; a record that loses its memory becomes ABSENT there.
    """

    def __init__(
        self, arena: Arena, capacity_bytes: int, num_bytes_of: Sequence[int], status: np.ndarray
    ) -> None:
        self._arena, self._num_bytes_of, self._status = arena, num_bytes_of, status
        self._base = arena.address
        self.extents = Extents(capacity_bytes)
        self.address = [0] * len(num_bytes_of)  # by key; 0: absent
        self._key_at: dict[int, int] = {}  # offset -> key
        self.moved_bytes = 0

    @property
    def num_resident(self) -> int:
        return len(self._key_at)

    def place(self, key: int) -> bool:
        """Give a record memory; False where no single extent is large enough."""
        offset = self.extents.allocate(self._num_bytes_of[key])
        if offset is None:
            return False
        self._key_at[offset] = key
        self.address[key] = self._base + offset
        return True

    def take_over(self, victim: int, key: int) -> None:
        """Give the memory of one record to another of the same size. Neither is being read."""
        address = self.address[victim]
        self._key_at[address - self._base] = key
        self.address[key] = address
        self.address[victim] = 0
        self._status[victim] = ABSENT

    def view(self, key: int) -> np.ndarray:
        """The bytes of a record, u8 [num_bytes]."""
        return self._arena.view(self.address[key] - self._base, self._num_bytes_of[key])

    def drop(self, key: int) -> None:
        """Take a record's memory back. The record must not be being read."""
        offset = self.address[key] - self._base
        self.extents.free(offset)
        del self._key_at[offset]
        self.address[key] = 0
        self._status[key] = ABSENT

    def join(
        self, num_bytes: int, fixed: Collection[int], max_moved_bytes: float = float("inf")
    ) -> bool:
        """Move records so that one free extent holds `num_bytes`; False where that cannot be done
        for this price.

        Neither the records `fixed` nor those being read move.
        """
        if self.extents.free_bytes < num_bytes:
            return False
        still = {
            offset
            for offset, key in self._key_at.items()
            if self._status[key] == READING or key in fixed
        }
        moves = self.extents.plan(num_bytes, still)
        if moves is None or sum(move.num_bytes for move in moves) > max_moved_bytes:
            return False
        for move in moves:
            self._copy(move)
        self.extents.apply(moves)
        return True

    def shrink(self, capacity_bytes: int) -> list[int]:
        """Move records below a new end; returns the keys of those that found no place there.

        No record may be being read. The caller drops the returned ones, then resizes.
        """
        homeless = []
        for offset, num_bytes in self.extents.blocks():
            if offset + num_bytes <= capacity_bytes:
                continue
            target = self.extents.allocate(num_bytes, below=capacity_bytes)
            if target is None:
                homeless.append(self._key_at[offset])
            else:
                self._copy(Move(offset, target, num_bytes))
                self.extents.free(offset)
        return homeless

    def resize(self, capacity_bytes: int, keeps_memory: bool = False) -> None:
        """Move the end, beyond which nothing may lie; memory beyond it goes back to the system."""
        old = self.extents.num_bytes
        self.extents.resize(capacity_bytes)
        if capacity_bytes < old and not keeps_memory:
            self._arena.discard(capacity_bytes, old - capacity_bytes)

    def _copy(self, move: Move) -> None:
        key = self._key_at.pop(move.source)
        if self._status[key] == READY:  # else its bytes are still to be read
            target = self._arena.view(move.target, move.num_bytes)
            target[...] = self._arena.view(move.source, move.num_bytes)  # NumPy minds the overlap
            self.moved_bytes += move.num_bytes
        self._key_at[move.target] = key
        self.address[key] = self._base + move.target
