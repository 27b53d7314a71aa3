"""A bound on what an eviction policy may lose against plain LRU. Floor 1.

Beside the pool runs the account of an LRU pool of as many bytes (`shadow`). Two numbers decide,
both in bytes:

- credit: hits of the pool minus hits of the shadow, so far;
- debt: records that the shadow has and the pool has not. Each can become a hit of the shadow that
  is a miss of the pool, once.

The allowance is a record for every second eviction of LRU, up to 56, then one less for every eight
evictions, down to 32, and one for each 96 evictions. While debt <= credit + allowance holds after
one record more that the shadow has, the policy's choice stands. Otherwise only records go that the
shadow has not. There is always one: the pool is full without the demanded record that it lacks, and
the shadow has that one already. So debt never grows then, and since debt >= 0,

    misses of the pool <= misses of LRU + min(56, evictions of LRU / 2) + evictions of LRU / 96

at every moment, whatever is demanded, for records of one size. The last term lets a policy that
had bad luck try again. What is allowed early is what a forecast needs to prove itself: with one
record for each 24 evictions and no more, pools that hold nearly everything deviated too rarely to
gain, and missed one to three records more than LRU where the same forecast unguarded missed less. A
forecast that had that room for some hundreds of evictions has earned credit or gets less of it.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_EVICTIONS_PER_EARLY_LOSS, _EVICTIONS_PER_LOSS = 2, 96
_EARLY_RECORDS, _EVICTIONS_PER_LESS, _LATE_RECORDS = 70, 8, 32


class Guard:
    """Twin of runtime/csrc/cache_guard.h. `sizes`: bytes by key."""

    def __init__(self, sizes: Sequence[int] | NDArray[np.int64]) -> None:
        self._sizes = [int(size) for size in sizes]
        self._largest = max(self._sizes, default=0)
        self.in_shadow = np.zeros(len(sizes), dtype=np.bool_)
        self._shadow: OrderedDict[int, None] = OrderedDict()  # the one not used for longest first
        self._is_resident = [False] * len(sizes)
        self._is_expected = [False] * len(sizes)  # demanded, and what is read for it not yet told
        self._capacity = self._used = 0  # of the shadow
        self._credit = self._debt = self._evicted = 0

    @property
    def is_free(self) -> bool:
        """Whether a record may be evicted that the shadow has."""
        falling = _EARLY_RECORDS * self._largest - self._evicted // _EVICTIONS_PER_LESS
        early = min(
            self._evicted // _EVICTIONS_PER_EARLY_LOSS, max(falling, _LATE_RECORDS * self._largest)
        )
        lost = self._debt + self._largest - self._credit - early
        return lost * _EVICTIONS_PER_LOSS <= self._evicted

    def set_share(self, share: float) -> None:
        self._capacity = int(share * sum(self._sizes) + 0.5)
        while self._used > self._capacity:
            self._forget()

    def expect(self, keys: NDArray[np.int64]) -> None:
        """`keys` are demanded together; before room is made for those absent."""
        new = [key for key in keys.tolist() if not self._is_expected[key]]
        is_hit = [bool(self.in_shadow[key]) for key in new]
        needed = 0
        for key, hit in zip(new, is_hit, strict=True):
            size, is_resident = self._sizes[key], self._is_resident[key]
            self._is_expected[key] = True
            self._credit += size * (is_resident - hit)
            if hit:
                del self._shadow[key]  # and stays in _used
                self._debt -= 0 if is_resident else size
            else:
                needed += size
        while self._shadow and self._used + needed > self._capacity:
            self._evicted += self._forget()
        for key, hit in zip(new, is_hit, strict=True):
            if not hit and self._used + self._sizes[key] > self._capacity:
                continue
            self._used += 0 if hit else self._sizes[key]
            self.in_shadow[key] = True
            self._shadow[key] = None

    def touch(self, keys: NDArray[np.int64]) -> None:
        """The demand has been met."""
        self.expect(keys)
        for key in keys.tolist():
            self._is_expected[key] = False
            if self.in_shadow[key] and not self._is_resident[key]:
                self._debt += self._sizes[key]

    def insert(self, key: int) -> None:
        """What is read unasked (warm start, guess) is lent to the shadow while it has room."""
        if self._is_resident[key]:
            return
        self._is_resident[key] = True
        if self._is_expected[key]:
            return
        if self.in_shadow[key]:
            self._debt -= self._sizes[key]
        elif self._used + self._sizes[key] <= self._capacity:
            self._used += self._sizes[key]
            self.in_shadow[key] = True
            self._shadow[key] = None
            self._shadow.move_to_end(key, last=False)

    def remove(self, key: int) -> None:
        if not self._is_resident[key]:
            return
        self._is_resident[key] = False
        if self.in_shadow[key] and not self._is_expected[key]:
            self._debt += self._sizes[key]

    def _forget(self) -> int:
        key, _ = self._shadow.popitem(last=False)
        size = self._sizes[key]
        self._used -= size
        self.in_shadow[key] = False
        if not (self._is_resident[key] or self._is_expected[key]):
            self._debt -= size
        return size
