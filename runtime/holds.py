"""Which records of the expert cache are not to be evicted, and why. Floor 1.

A record is pinned (demanded and not yet released), being read with nobody waiting for it any more,
or wanted later in the layer that runs now. Absent ones are no candidates either.
"""

from collections.abc import Sequence

import numpy as np


class Holds:
    """`num_bytes` and `address` by key; an address is 0 while the record is absent."""

    def __init__(self, num_bytes: Sequence[int], address: Sequence[int]) -> None:
        self._num_bytes, self._address = num_bytes, address
        self.pins: dict[int, int] = {}  # key -> by how many hints
        self.pinned_bytes = 0
        self.unsettled: set[int] = set()  # released while being read
        self.wanted: list[int] = []  # resident, needed later in this layer; first needed first
        self.blocked = np.ones(len(num_bytes), dtype=np.bool_)  # not for the policy to take

    def pin(self, keys: Sequence[int]) -> None:
        """Hold `keys` until each is unpinned as often as it was pinned."""
        pins = self.pins
        for key in keys:
            if key in pins:
                pins[key] += 1
            else:
                pins[key] = 1
                self.pinned_bytes += self._num_bytes[key]
        self.blocked[keys] = True
        if self.wanted:
            self.wanted = [key for key in self.wanted if key not in pins]

    def unpin(self, keys: Sequence[int]) -> list[int]:
        """Take one pin off each; returns those that have none left, which stay blocked."""
        pins, freed = self.pins, []
        for key in keys:
            count = pins[key] - 1
            if count:
                pins[key] = count
            else:
                del pins[key]
                self.pinned_bytes -= self._num_bytes[key]
                freed.append(key)
        return freed

    def let_go(self, keys: Sequence[int]) -> None:
        """Leave `keys` to the policy."""
        self.blocked[keys] = False

    def want(self, keys: Sequence[int]) -> None:
        """The layer that begins needs `keys`, in this order; those of the one before go to the
        policy, unless something else holds them."""
        for key in self.wanted:
            if self._address[key] and key not in self.pins and key not in self.unsettled:
                self.blocked[key] = False
        self.wanted = [key for key in keys if not self.blocked[key]]
        if self.wanted:
            self.blocked[self.wanted] = True

    def left_alone(self) -> list[int]:
        """Those that are unsettled for certain: the ones pinned again, or gone, are so no more."""
        self.unsettled = {
            key for key in self.unsettled if self._address[key] and key not in self.pins
        }
        return list(self.unsettled)

    def settle(self, key: int) -> None:
        """Its read has ended: the policy may take it."""
        self.unsettled.discard(key)
        self.blocked[key] = False
