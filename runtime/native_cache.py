"""The expert cache in the core, behind the interface of its reference (cache.py). Floor 1."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from . import core
from .cache import MAX_MOVED_PER_BYTE, ExpertCache
from .cache_base import CORE_TIMES, CacheBase, HintResult, whole_pages
from .errors import EdgeMoeError, UsageError
from .index import ExpertRecord
from .io import Arena, RecordReader
from .policy import DEFAULT_POLICY, HALF_LIFE, check_policy
from .records import RecordTable


class NativeCache(CacheBase):
    """As `ExpertCache`, for a native reader. `handle` is what `em_decode` takes."""

    def __init__(
        self,
        reader: RecordReader,
        arena: Arena,
        capacity_bytes: int,
        records: Mapping[tuple[int, int], ExpertRecord],
        policy: str = DEFAULT_POLICY,
        max_moved_per_byte: float = MAX_MOVED_PER_BYTE,
    ) -> None:
        self.reader, self._arena = reader, arena
        self.table = table = RecordTable(records)
        check_policy(policy)
        places = len(table.first_key)
        first_keys = np.array([*table.first_key.values(), len(table)], dtype=np.int64)
        config = core.CacheConfig(
            arena=arena.address,
            arena_bytes=arena.num_bytes,
            capacity_bytes=whole_pages(capacity_bytes, arena),
            first_keys=first_keys.ctypes.data,
            num_places=places,
            policy=policy.encode(),
            half_life=HALF_LIFE,
            max_moved_per_byte=max_moved_per_byte,
        )
        self._lib = core.lib
        self.handle: int | None = core.lib.em_cache_create(reader.handle, config)
        if not self.handle:
            raise EdgeMoeError("the core refused to make an expert cache", "memory is short")
        # Views of the core's memory, not to be used after `close`.
        addresses = core.lib.em_cache_addresses(self.handle)
        self._addresses = np.ctypeslib.as_array(addresses, shape=(len(table),))
        sums = core.lib.em_cache_place_stats(self.handle)
        self.place_stats = np.ctypeslib.as_array(sums, shape=(places, 6))
        self._demand = core.CacheDemand()
        self._stats = core.CacheStats()

    @property
    def capacity_bytes(self) -> int:
        return self._now().capacity_bytes

    @property
    def resident_bytes(self) -> int:
        return self._now().resident_bytes

    @property
    def pinned_bytes(self) -> int:
        return self._now().pinned_bytes

    @property
    def num_resident(self) -> int:
        return self._now().num_resident

    @property
    def moved_bytes(self) -> int:
        return self._now().moved_bytes

    @property
    def evictions(self) -> int:
        return self._now().num_evictions

    @property
    def core_s(self) -> NDArray[np.float64]:
        now = self._now()
        return np.array([getattr(now, f"{name}_ns") for name in CORE_TIMES]) * 1e-9

    def addresses(self, keys: Sequence[int]) -> list[int]:
        return self._addresses[keys].tolist()

    def resident_mask(self) -> NDArray[np.bool_]:
        return self._addresses != 0

    def _begin_place(self, place: int, num_tokens: int, keys: Sequence[int]) -> None:
        wanted = np.array(keys, dtype=np.int32)
        _expect(
            self._lib.em_cache_begin_layer(
                self.handle, place, num_tokens, len(wanted), wanted.ctypes.data
            )
        )

    def _route(self, routes: NDArray[np.integer]) -> None:
        ids = np.ascontiguousarray(routes, dtype=np.int32)
        _expect(self._lib.em_cache_route(self.handle, *ids.shape, ids.ctypes.data))

    def try_hint(
        self, keys: Sequence[int], counts: NDArray[np.int64] | None = None
    ) -> HintResult | None:
        index = np.array(keys, dtype=np.int32)
        wanting = None if counts is None else np.ascontiguousarray(counts, dtype=np.float64)
        status = self._lib.em_cache_hint(
            self.handle,
            len(index),
            index.ctypes.data,
            None if wanting is None else wanting.ctypes.data,
            self._demand,
        )
        if status == 0:
            return None
        _expect(status if status < 0 else 0)
        demand = self._demand
        return HintResult(demand.num_hits, demand.num_misses, demand.num_bytes)

    def view(self, key: int) -> np.ndarray:
        offset = int(self._addresses[key]) - self._arena.address
        return self._arena.view(offset, self.table.num_bytes[key])

    def release(self, keys: Sequence[int]) -> None:
        index = np.array(keys, dtype=np.int32)
        _expect(self._lib.em_cache_release(self.handle, len(index), index.ctypes.data))

    def foresee(self, keys: Sequence[int]) -> None:
        """Begin to read the first of keys that will be demanded for certain, in this order, and
        keep those that are there; as many as half of the cache holds. None: nothing is certain."""
        index = np.array(keys, dtype=np.int32)
        most_bytes = self.capacity_bytes // 2
        _expect(
            min(
                0,
                self._lib.em_cache_foresee(self.handle, len(index), index.ctypes.data, most_bytes),
            )
        )

    @property
    def foreseen(self) -> tuple[int, int]:
        """Reads begun of certain demand so far, and those of them whole when it came."""
        now = self._now()
        return now.num_foreseen, now.num_foreseen_in_time

    def seed(self, keys: Sequence[int], counts: NDArray[np.floating]) -> None:
        index, weights = np.array(keys, dtype=np.int32), np.array(counts, dtype=np.float64)
        _expect(
            self._lib.em_cache_seed(self.handle, len(index), index.ctypes.data, weights.ctypes.data)
        )

    def _begin_reads(self, keys: Sequence[int]) -> list[int]:
        index = np.array(keys, dtype=np.int32)
        placed = np.empty_like(index)
        count = self._lib.em_cache_preload(
            self.handle, len(index), index.ctypes.data, placed.ctypes.data
        )
        _expect(min(count, 0))
        return placed[:count].tolist()

    def _end_reads(self) -> None:
        self._lib.em_cache_settle(self.handle)

    def _resize(self, capacity_bytes: int, keeps_memory: bool) -> None:
        _expect(self._lib.em_cache_resize(self.handle, capacity_bytes, keeps_memory))

    def close(self) -> None:
        if self.handle:
            self.place_stats, self._addresses = self.place_stats.copy(), self._addresses.copy()
            self._now()
            self._lib.em_cache_destroy(self.handle)
            self.handle = None

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.em_cache_destroy(self.handle)

    def _now(self) -> core.CacheStats:
        if self.handle:
            self._lib.em_cache_get_stats(self.handle, self._stats)
        return self._stats


def make_cache(
    reader: RecordReader,
    arena: Arena,
    capacity_bytes: int,
    records: Mapping[tuple[int, int], ExpertRecord],
    policy: str = DEFAULT_POLICY,
    backend: str | None = None,
) -> CacheBase:
    """The expert cache of a backend."""
    kind = NativeCache if (backend or core.BACKEND) == "native" else ExpertCache
    return kind(reader, arena, capacity_bytes, records, policy)


def _expect(status: int) -> None:
    if status:
        raise UsageError("the expert cache was asked for what cannot be", f"status {status}")
