"""What the expert cache and its twin in the core have in common. Floor 1."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import BudgetError, UsageError
from .format import PAGE_BYTES
from .io import READY, Arena, RecordReader
from .records import RecordTable

# Columns of `place_stats`.
HITS, MISSES, BYTES, STALL_NS, COMPUTE_NS, GUESSED = range(6)
CORE_TIMES = ("native", "decide", "guess", "submit")  # as em_cache_stats has them, in ns


class HintResult(NamedTuple):
    """Demand of one hint, in records and in bytes to read."""

    num_hits: int
    num_misses: int
    bytes_read: int


def whole_pages(capacity_bytes: int, arena: Arena) -> int:
    """The capacity in whole pages; UsageError where the arena is smaller."""
    if not 0 <= capacity_bytes <= arena.num_bytes:
        raise UsageError(
            f"an expert cache of {capacity_bytes} bytes does not fit into its arena",
            f"the arena has {arena.num_bytes} bytes",
        )
    return capacity_bytes // PAGE_BYTES * PAGE_BYTES


def layers_alike(table: RecordTable) -> list[int]:
    """All keys but stand-ins, the first experts of every layer first."""
    first = list(table.first_key.values())
    places = table.place_of_key
    return sorted(table.own_keys, key=lambda key: key - first[places[key]])


def in_use() -> UsageError:
    return UsageError("the expert cache cannot change its capacity while records are in use")


class CacheBase(ABC):
    """`place_stats` [places, 6]: sums by place in the cycle of MoE layers, columns as above."""

    reader: RecordReader
    table: RecordTable
    place_stats: NDArray[np.int64]

    @property
    def hits(self) -> int:
        return int(self.place_stats[:, HITS].sum())

    @property
    def misses(self) -> int:
        return int(self.place_stats[:, MISSES].sum())

    @property
    def bytes_read(self) -> int:
        return int(self.place_stats[:, BYTES].sum())

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """Bytes for records."""

    @property
    @abstractmethod
    def pinned_bytes(self) -> int:
        """Bytes of the records that are in use."""

    def hint(self, keys: Sequence[int], counts: NDArray[np.int64] | None = None) -> HintResult:
        """Pin the records of `keys` (each once), most urgent first, and start reading those absent.

        `counts`: how many tokens want each record, where it is more than one token's demand. Raises
        BudgetError where the records do not fit into the capacity together.
        """
        result = self.try_hint(keys, counts)
        if result is None:
            raise self.no_room(keys)
        return result

    @abstractmethod
    def try_hint(
        self, keys: Sequence[int], counts: NDArray[np.int64] | None = None
    ) -> HintResult | None:
        """`hint`, or None and nothing changed but evictions where the records do not fit now."""

    def no_room(self, keys: Sequence[int]) -> BudgetError:
        """The error where these records cannot be pinned together."""
        needed = sum(self.table.num_bytes[key] for key in keys)
        return BudgetError(
            f"{needed} bytes of expert records do not fit into the expert cache at once",
            f"it has {self.capacity_bytes} bytes, of which {self.pinned_bytes} are in use",
            "give it a larger --memory",
        )

    def wait(self, key: int) -> None:
        """Block until a pinned record is whole. Raises RecordError where its read failed."""
        status = self.reader.wait(key)
        if status != READY:
            raise self.table.failure(key, status)
