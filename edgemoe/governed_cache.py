"""An expert cache whose size follows the governor: between two steps, never during one. Floor 3."""

import time

from .runtime.cache_base import STALL_NS, CacheBase
from .runtime.governor import Governor, Signals
from .runtime.pressure import read_pressure

_START_SHARE = 0.5  # of the memory that is available when the engine opens


class GovernedCache:
    """A context around each step; at most once a second it looks, and resizes the cache."""

    def __init__(self, cache: CacheBase, least: int) -> None:
        self._cache, self._busy_s, self._began = cache, 0.0, 0.0
        first = self._signals(time.monotonic())
        most, available = cache.capacity_bytes, first.pressure.available_bytes
        start = most if available is None else min(most, int(_START_SHARE * available))
        self.governor = Governor(least, most, start, first)
        self._apply(self.governor.capacity)

    def set_most(self, capacity_bytes: int) -> None:
        """The budget leaves so much from now on."""
        governor = self.governor
        if governor.capacity == governor.most:
            governor.capacity = capacity_bytes
        governor.most = capacity_bytes
        governor.capacity = min(governor.capacity, capacity_bytes)
        self._apply(governor.capacity)

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._busy_s += now - self._began
        if self.governor.is_due(now):
            self._apply(self.governor.step(self._signals(now)))

    def _signals(self, now_s: float) -> Signals:
        stall_s = float(self._cache.place_stats[:, STALL_NS].sum()) * 1e-9
        return Signals(now_s, self._busy_s, stall_s, read_pressure())

    def _apply(self, capacity_bytes: int) -> None:
        if capacity_bytes != self._cache.capacity_bytes:
            self._cache.trim(capacity_bytes)
