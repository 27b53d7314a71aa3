"""What the Python reader keeps of a record that is being read, and its statistics. Floor 0.

Requests and their order: csrc/read_queue.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

DOWN_LAG = 2


@dataclass(slots=True)
class ReadStats:
    """em_store_stats: what was read and what it cost, times in ns."""

    num_reads: int = 0
    num_requests: int = 0
    num_bytes: int = 0
    cancelled_bytes: int = 0
    priority_bytes: list[int] = field(default_factory=lambda: [0, 0, 0])
    read_ns: int = 0
    cpu_ns: int = 0
    crc_ns: int = 0
    throttle_bytes_per_s: int = 0
    throttle_busy_ns: int = 0
    idle_ns: int = 0  # the core's alone


@dataclass(slots=True)
class Read:
    """A record being read; lists are by section: gate|up, down."""

    view: np.ndarray  # u8 [num_bytes]
    ends: list[int]  # of the sections, within the record
    turn: int
    priority: int
    issued: list[int]  # where the next request of each section begins
    left: list[int]  # bytes that have not landed
    is_done: list[bool] = field(default_factory=lambda: [False, False])
    num_in_flight: int = 0
    error: int = 0
    is_cancelled: bool = False

    def tasks(self) -> list[tuple[int, int, int]]:
        """(priority, order, section) of what is still to be requested."""
        if self.is_cancelled or self.error:
            return []
        lag = DOWN_LAG if self.priority == 0 else 0
        return [
            (self.priority, self.turn + lag * section, section)
            for section in (0, 1)
            if self.issued[section] < self.ends[section]
        ]

    def fail(self, error: int) -> None:
        self.error = self.error or error


class Request(NamedTuple):
    key: int
    section: int
    priority: int
    begin: int
    num_bytes: int
