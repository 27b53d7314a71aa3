"""An emulated drive: when requests would end on a slower one; twin of csrc/throttle. Floor 0.

Keeps the books only: every clock is given, in ns, and nothing waits here.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

NEVER = (1 << 63) - 1


class _Item(NamedTuple):
    priority: int
    turn: int
    tag: int
    key: int
    num_bytes: int


@dataclass(slots=True)
class Throttle:
    """Serves one request at a time, n bytes for n / `rate` seconds without a break; of those that
    wait, the most urgent next, else the one that came first. `rate` 0: off."""

    rate: int = 0  # bytes per second
    busy_ns: int = 0  # of all services begun
    _serving: _Item | None = None
    _end: int = 0
    _turn: int = 0
    _waiting: list[_Item] = field(default_factory=list)
    _ended: list[int] = field(default_factory=list)  # tags

    def set_rate(self, bytes_per_s: int, now: int) -> None:
        """0 ends everything at once; else what is being served keeps its end."""
        self._advance(now)
        self.rate = bytes_per_s
        if bytes_per_s:
            return
        if self._serving is not None:
            self.busy_ns -= max(0, self._end - now)
            self._ended.append(self._serving.tag)
        self._ended += [item.tag for item in sorted(self._waiting, key=lambda item: item.turn)]
        self._serving = None
        self._waiting.clear()

    def add(self, tag: int, key: int, priority: int, num_bytes: int, now: int) -> None:
        """A request of a record reaches the drive."""
        self._advance(now)
        item = _Item(priority, self._turn, tag, key, num_bytes)
        self._turn += 1
        if self._serving is None:
            self._serve(item, now)
        else:
            self._waiting.append(item)

    def promote(self, key: int, priority: int, now: int) -> None:
        """Requests of a record that are not being served yet become as urgent as this."""
        self._advance(now)
        for i, item in enumerate(self._waiting):
            if item.key == key and priority < item.priority:
                self._waiting[i] = item._replace(priority=priority, turn=self._turn)
                self._turn += 1

    def take(self, now: int, tag: int) -> bool:
        """Whether this request has ended; then it is no longer known."""
        self._advance(now)
        if tag not in self._ended:
            return False
        self._ended.remove(tag)
        return True

    def due(self) -> int:
        """When the next one ends."""
        return NEVER if self._serving is None else self._end

    def _advance(self, now: int) -> None:
        while self._serving is not None and self._end <= now:
            self._ended.append(self._serving.tag)
            self._serving = None
            if not self._waiting:
                return
            item = min(self._waiting)
            self._waiting.remove(item)
            self._serve(item, self._end)

    def _serve(self, item: _Item, begin: int) -> None:
        took = math.ceil(item.num_bytes / self.rate * 1e9)
        self._serving, self._end = item, begin + took
        self.busy_ns += took
