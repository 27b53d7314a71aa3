"""Fills the expert cache with what is likely to be wanted, before the first request. Floor 3.

What is known beforehand: the store's profile (how often each expert is chosen) and which records
were in memory when the last engine of this store was closed. A thread reads the most valuable
records in short steps, each of which holds the engine's lock, from opening until the first tokens
are fed, never with an eviction; so it delays a request by one step at most (STEP_S). Nothing of it
counts as demand. Where neither profile nor last run is there, it reads only if everything fits.
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .last_run import load_last_run
from .runtime.cache_base import CacheBase
from .runtime.errors import EdgeMoeError
from .runtime.index import StoreIndex
from .runtime.profile import PROFILE_FILE
from .runtime.profile_parts import read_popularity

STEP_S = 0.01  # of reading in one go; one record at least
PAUSE_S = 0.001  # between two: a lock that is taken again at once never reaches who waits for it
_PRIOR_TOKENS = 16 / np.log(2.0)  # what a frequency with a half-life of 16 tokens decays to


def expected_use(index: StoreIndex, top_k: int) -> tuple[NDArray[np.float64], list[str], list[str]]:
    """How often a token is expected to choose each record, [num_records] in (layer, expert) order;
    what it was learnt from; and notes on what could not be used. All zero: nothing is known."""
    num_experts = index.layer_to_num_experts
    sources: list[NDArray[np.float64]] = []
    names: list[str] = []
    notes: list[str] = []
    path = index.path / PROFILE_FILE
    if path.is_file():
        try:
            shares = read_popularity(path, num_experts, top_k)
            sources.append(np.concatenate([shares[layer] for layer in num_experts]))
            names.append("profile")
        except EdgeMoeError as error:
            notes.append(f"the profile is not used: {error}")
    try:
        resident = load_last_run(index)
    except EdgeMoeError as error:
        resident = None
        notes.append(f"the state of the last run is not used: {error}")
    if resident is not None and resident.any():
        share = np.concatenate(
            [
                part * top_k / max(1.0, float(part.sum()))
                for part in np.split(
                    resident.astype(np.float64), np.cumsum(list(num_experts.values()))[:-1]
                )
            ]
        )
        sources.append(share)
        names.append("last run")
    if not sources:
        return np.zeros(len(index.records)), names, notes
    return sum(sources) / len(sources), names, notes


class WarmStart:
    """One engine's; begins at once in a thread of its own, where there is anything to read."""

    def __init__(
        self,
        cache: CacheBase,
        use: NDArray[np.float64],
        sources: Sequence[str],
        lock: Any,
    ) -> None:
        self.sources = list(sources)
        self.num_bytes, self.num_records, self.seconds = 0, 0, 0.0
        self._cache, self._lock = cache, lock
        self._stopped = threading.Event()
        sizes, keys = cache.table.num_bytes, np.array(cache.table.own_keys)
        if self.sources:
            order = np.argsort(-use, kind="stable")
            known = order[use[order] > 0]
            cache.seed(keys[known].tolist(), use[known] * _PRIOR_TOKENS)
            self._keys = keys[order].tolist()
        else:
            self._keys = keys.tolist()
        if not self.sources and sum(sizes[key] for key in self._keys) > cache.capacity_bytes:
            self._keys = []
        self._thread = threading.Thread(target=self._run, name="edgemoe-warm-start", daemon=True)
        if self._keys:
            self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it was stopped: tokens have been fed."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Read no further; returns when no step is under way. Must not hold the lock."""
        if not self._stopped.is_set():
            self._stopped.set()
            with self._lock:
                pass

    def finish(self) -> None:
        """Wait until it has read what fits, or was stopped."""
        if self._thread.ident is not None:
            self._thread.join()

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the report."""
        return {
            "sources": self.sources,
            "bytes": self.num_bytes,
            "records": self.num_records,
            "seconds": self.seconds,
        }

    def _run(self) -> None:
        sizes = self._cache.table.num_bytes
        position, step_bytes = 0, 1
        start = time.perf_counter()
        while position < len(self._keys):
            keys: list[int] = []
            num_bytes = 0
            while position < len(self._keys) and (not keys or num_bytes < step_bytes):
                keys.append(self._keys[position])
                num_bytes += sizes[keys[-1]]
                position += 1
            with self._lock:
                if self._stopped.is_set():
                    break
                began, before = time.perf_counter(), self._cache.num_resident
                try:
                    read = self._cache.preload(keys)
                except EdgeMoeError:  # whoever wants the record is told
                    break
                elapsed = time.perf_counter() - began
                self.num_bytes += read
                self.num_records += self._cache.num_resident - before
                self.seconds = time.perf_counter() - start
                room = self._cache.capacity_bytes - self._cache.resident_bytes
            if room < min(sizes):
                break
            if read:
                step_bytes = int(read / max(elapsed, 1e-6) * STEP_S)
            time.sleep(PAUSE_S)
