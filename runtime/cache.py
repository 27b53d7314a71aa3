"""The expert cache: which expert records are in memory, and where. Floor 1.

One arena for all layers, accounted to the byte: records of different sizes share it, and
`resident_bytes` (records being read included) never exceeds `capacity_bytes`.

A record is absent, being read, or resident. `hint` takes the records that the router has just
demanded: it counts hits and misses, pins the records, makes room and starts the reads; `release`
unpins them. A pinned record or one being read is never evicted or moved, so an address is good from
`hint` to `release`. Serves one thread at a time; the reads run in the reader's threads.

This is the reference: the native backend runs its twin in the core (native_cache.py), which decides
alike.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .cache_base import (
    CORE_TIMES,
    STALL_NS,
    CacheBase,
    HintResult,
    whole_pages,
)
from .holds import Holds
from .index import ExpertRecord
from .io import READING, READY, Arena, RecordReader
from .policy import DEFAULT_POLICY, NO_VICTIM, make_policy
from .records import RecordTable
from .slots import Slots

# Records of different sizes leave free bytes scattered. To join them by moving records is worth so
# many bytes moved per byte needed, where the records are few; else one more victim costs less. On
# the demo model with stand-ins (two sizes) .5-2 % fewer bytes are read than without moves, and 1-3
# in 100 are moved; with 4, 1.5-3 % fewer and 7-14 in 100, while the read waits: a copy takes a
# quarter of the time of a read. 1,500 records: hit rate .826 without moves, .829 with them.
MAX_MOVED_PER_BYTE = 1.0
_MAX_RECORDS_TO_PLAN = 256


class ExpertCache(CacheBase):
    """`capacity_bytes` of `arena` for one store's records; keys are those of the reader."""

    def __init__(
        self,
        reader: RecordReader,
        arena: Arena,
        capacity_bytes: int,
        records: Mapping[tuple[int, int], ExpertRecord],
        policy: str = DEFAULT_POLICY,
        max_moved_per_byte: float = MAX_MOVED_PER_BYTE,
    ) -> None:
        self.reader = reader
        self.table = table = RecordTable(records)
        self._num_bytes_of = table.num_bytes
        self._max_record_bytes = max(table.num_bytes, default=0)
        self._policy = make_policy(policy, table.place_of_key, max(1, len(table.first_key)))
        self._policy.set_sizes(table.num_bytes)
        self._arena = arena
        self._status = reader.status
        pages = whole_pages(capacity_bytes, arena)
        self._slots = Slots(arena, pages, self._num_bytes_of, reader.status)
        self._address = self._slots.address  # by key; 0: absent
        self._max_moved_per_byte = max_moved_per_byte
        self._holds = Holds(table.num_bytes, self._address)
        self._set_share(self.capacity_bytes)
        self._victims: Iterator[int] = iter(())
        self._place, self._step, self._num_tokens = 0, 0, 1
        # Sums by place in the cycle of MoE layers; times are added by who runs the layers.
        self.place_stats = np.zeros((len(table.first_key), 6), dtype=np.int64)
        self.evictions = 0
        self.core_s = np.zeros(len(CORE_TIMES))  # a token never decodes in the core here

    @property
    def capacity_bytes(self) -> int:
        return self._slots.extents.num_bytes

    @property
    def resident_bytes(self) -> int:
        return self._slots.extents.used_bytes

    @property
    def pinned_bytes(self) -> int:
        return self._holds.pinned_bytes

    @property
    def num_resident(self) -> int:
        return self._slots.num_resident

    @property
    def moved_bytes(self) -> int:
        return self._slots.moved_bytes

    def addresses(self, keys: Sequence[int]) -> list[int]:
        return [self._address[key] for key in keys]

    def fits(self, keys: Sequence[int]) -> bool:
        """Whether these records can be pinned beside those that are pinned now."""
        room = self.capacity_bytes - self.pinned_bytes
        if len(keys) * self._max_record_bytes <= room:
            return True
        return sum(self._num_bytes_of[key] for key in keys if key not in self._holds.pins) <= room

    def resident_mask(self) -> NDArray[np.bool_]:
        return np.array(self.addresses(range(len(self.table)))) != 0

    def _begin_place(self, place: int, num_tokens: int, keys: Sequence[int]) -> None:
        if place <= self._place:
            self._step += num_tokens
        self._place, self._num_tokens = place, num_tokens
        self._holds.want(keys)

    def _route(self, routes: NDArray[np.integer]) -> None:
        self._policy.route(self._place, routes, self._step)

    def try_hint(
        self, keys: Sequence[int], counts: NDArray[np.int64] | None = None
    ) -> HintResult | None:
        self._settle(wait=False)
        address = self._address
        absent = [key for key in keys if not address[key]]
        index = np.array(keys, dtype=np.int64)
        if absent:
            if not self.fits(keys):
                return None
            self._policy.expect(index)
            if not self._read(keys, absent):
                return None
        else:
            self._holds.pin(keys)
        self._policy.touch(index, self._step, self._num_tokens, counts)
        num_bytes = 0
        for key in absent:
            num_bytes += self._num_bytes_of[key]
        num_hits = len(index) - len(absent)
        self.place_stats[self._place, :STALL_NS] += (num_hits, len(absent), num_bytes)
        return HintResult(num_hits, len(absent), num_bytes)

    def view(self, key: int) -> np.ndarray:
        return self._slots.view(key)

    def release(self, keys: Sequence[int]) -> None:
        freed = self._holds.unpin(keys)
        if not freed:
            return
        if self._status[freed].tolist().count(READY) == len(freed):
            self._holds.let_go(freed)
        else:
            self._holds.unsettled.update(freed)
            self._settle(wait=False)

    def seed(self, keys: Sequence[int], counts: NDArray[np.floating]) -> None:
        self._policy.seed(np.array(keys, dtype=np.int64), self._step, counts)

    def _begin_reads(self, keys: Sequence[int]) -> list[int]:
        placed = [key for key in keys if not self._address[key] and self._slots.place(key)]
        index = np.array(placed, dtype=np.int32)
        try:
            self.reader.submit(index, np.array(self.addresses(index), dtype=np.uint64))
        except BaseException:
            for key in placed:
                self._drop(key)
            raise
        self._holds.unsettled.update(placed)  # so that an interrupted wait leaves nothing behind
        for key in placed:
            self._policy.insert(key)
        return placed

    def _end_reads(self) -> None:
        self._settle(wait=True)

    def _resize(self, capacity_bytes: int, keeps_memory: bool) -> None:
        self._settle(wait=True)
        self._holds.want(())
        self._set_share(capacity_bytes)
        while self.resident_bytes > capacity_bytes:
            self._evict(next(self._policy.victims(self._place, self._holds.blocked)))
        for key in self._slots.shrink(capacity_bytes):
            self._evict(key)
        self._slots.resize(capacity_bytes, keeps_memory)

    def close(self) -> None:
        """Nothing to give back here: the memory is the arena's."""

    # ---- inside ------------------------------------------------------------------------------

    def _read(self, keys: Sequence[int], absent: list[int]) -> bool:
        """Pin `keys`, give the absent ones memory and submit their reads; False: no room."""
        fixed = set(self._holds.pins)  # their addresses are known to others
        self._holds.pin(keys)
        placed: list[int] = []
        is_submitted = False
        self._victims = self._policy.victims(self._place, self._holds.blocked, self._num_tokens)
        try:
            for key in absent:
                if not self._place_record(key, fixed):
                    return False
                placed.append(key)
            index = np.array(absent, dtype=np.int32)
            self.reader.submit(index, np.array(self.addresses(index), dtype=np.uint64))
            is_submitted = True
        finally:
            if not is_submitted:
                for key in placed:
                    self._drop(key)
                self.release(keys)
        for key in absent:
            self._policy.insert(key)
        return True

    def _place_record(self, key: int, fixed: set[int]) -> bool:
        """Give a record memory: a free extent, else by moving or evicting others, or False."""
        num_bytes, holds = self._num_bytes_of[key], self._holds
        limit = self._max_moved_per_byte * num_bytes
        if self._slots.num_resident > _MAX_RECORDS_TO_PLAN:
            limit = 0
        while not self._slots.place(key):
            if limit and self.capacity_bytes - self.resident_bytes >= num_bytes:
                joined, limit = self._slots.join(num_bytes, fixed, limit), 0  # tried once
                if joined:
                    continue
            victim = next(self._victims, NO_VICTIM)
            if victim == NO_VICTIM and holds.wanted:
                victim = holds.wanted.pop()  # the last of them is needed last
            if victim != NO_VICTIM and self._num_bytes_of[victim] == num_bytes:
                self._slots.take_over(victim, key)
                self._forget(victim)
                return True
            if victim != NO_VICTIM:
                self._evict(victim)
            elif holds.unsettled:
                self._settle(wait=True)
                self._victims = self._policy.victims(self._place, holds.blocked, self._num_tokens)
            elif not self._slots.join(num_bytes, fixed):
                return False
        return True

    def _set_share(self, capacity_bytes: int) -> None:
        if num_bytes := sum(self._num_bytes_of):
            self._policy.set_share(capacity_bytes / num_bytes)

    def _evict(self, key: int) -> None:
        self._slots.drop(key)
        self._forget(key)

    def _forget(self, victim: int) -> None:
        self._holds.blocked[victim] = True
        self._policy.remove(victim)
        self.evictions += 1

    def _drop(self, key: int) -> None:
        self._slots.drop(key)
        self._holds.blocked[key] = True

    def _settle(self, wait: bool) -> None:
        """Make records evictable whose reads have ended; `wait` for all of them."""
        for key in self._holds.left_alone():
            status = self.reader.wait(key) if wait else int(self._status[key])
            if status == READING:
                continue
            self._holds.settle(key)
            if status != READY:
                self._drop(key)
                self._policy.remove(key)
