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


def _layers_alike(table: RecordTable) -> list[int]:
    """All keys but stand-ins, the first experts of every layer first."""
    first = list(table.first_key.values())
    places = table.place_of_key
    return sorted(table.own_keys, key=lambda key: key - first[places[key]])


class CacheBase(ABC):
    """What the reference and its twin in the core do for whoever runs the layers.

    `place_stats` [places, 6]: sums by place in the cycle of MoE layers, columns as above. `core_s`:
    seconds in the core since the start, as CORE_TIMES names them. Keys are those of the reader.
    """

    reader: RecordReader
    table: RecordTable
    place_stats: NDArray[np.int64]
    core_s: NDArray[np.float64]
    num_resident: int
    moved_bytes: int
    evictions: int
    _arena: Arena

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
    def resident_bytes(self) -> int:
        """Bytes of all records in memory or being read into it."""

    @property
    @abstractmethod
    def pinned_bytes(self) -> int:
        """Bytes of the records that are in use."""

    @abstractmethod
    def addresses(self, keys: Sequence[int]) -> list[int]:
        """Where the records are or will be, 0: absent. Good from `hint` to `release`."""

    @abstractmethod
    def resident_mask(self) -> NDArray[np.bool_]:
        """Which records are in memory or being read into it, by key."""

    # ---- demand --------------------------------------------------------------------------------

    def begin_layer(
        self,
        layer: int,
        num_tokens: int = 1,
        keys: Sequence[int] = (),
        routes: NDArray[np.integer] | None = None,
    ) -> None:
        """Tell which layer the following hints belong to, and how many tokens go through it.

        `keys`: all records that the layer will need, in the order of use, where they come in more
        than one hint: those resident are kept for their turn as long as there is other room.
        `routes` [num_tokens, K]: the experts of each token, -1: none.
        """
        self._begin_place(self.table.place_of_layer[layer], num_tokens, keys)
        if routes is not None:
            self._route(routes)

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

    @abstractmethod
    def view(self, key: int) -> np.ndarray:
        """The bytes of a pinned record, u8 [num_bytes]."""

    @abstractmethod
    def release(self, keys: Sequence[int]) -> None:
        """Unpin what one hint pinned. A record whose read failed loses its memory."""

    # ---- between two steps ---------------------------------------------------------------------

    @abstractmethod
    def seed(self, keys: Sequence[int], counts: NDArray[np.floating]) -> None:
        """Let the policy start as if each of `keys` had been wanted `counts` times just now."""

    def preload(self, keys: Sequence[int] | None = None) -> int:
        """Read absent records as long as they fit without an eviction: those of `keys`, in this
        order, or all, of every layer as many. Returns the bytes read. Counts neither as demand nor
        as use.

        Raises RecordError for a record that cannot be read; those that can stay.
        """
        placed = self._begin_reads(_layers_alike(self.table) if keys is None else keys)
        statuses = [self.reader.wait(key) for key in placed]
        self._end_reads()
        for key, status in zip(placed, statuses, strict=True):
            if status != READY:
                raise self.table.failure(key, status)
        return sum(self.table.num_bytes[key] for key in placed)

    def trim(self, capacity_bytes: int, *, keeps_memory: bool = False) -> None:
        """Change the capacity, up or down within the arena, between two steps; what no longer fits
        is evicted and its memory goes back to the system, or is the caller's (`keeps_memory`)."""
        new = whole_pages(capacity_bytes, self._arena)
        if self.pinned_bytes:
            raise UsageError("the expert cache cannot change its capacity while records are in use")
        self._resize(new, keeps_memory)

    @abstractmethod
    def close(self) -> None:
        """Give back what is not the arena's; sums can still be read."""

    # ---- what differs --------------------------------------------------------------------------

    @abstractmethod
    def _begin_place(self, place: int, num_tokens: int, keys: Sequence[int]) -> None: ...

    @abstractmethod
    def _route(self, routes: NDArray[np.integer]) -> None: ...

    @abstractmethod
    def _begin_reads(self, keys: Sequence[int]) -> list[int]:
        """Give those absent memory as long as there is free one, and submit their reads; returns
        them. Raises OSError where none can be submitted."""

    @abstractmethod
    def _end_reads(self) -> None:
        """All reads have ended: leave what is whole to the policy, and drop what is not."""

    @abstractmethod
    def _resize(self, capacity_bytes: int, keeps_memory: bool) -> None: ...
