"""Finds the knee: how large an expert pool can be before memory gets short. Floor 0.

Pure control: it is told signals and answers with a capacity, between a floor and the budget's
ceiling. More cache raises the hit rate for ever, but from some size on the system takes pages away
and everything slows down (streaming.md 2.1), so the hit rate is not asked. Shrinks at once where
major faults, waiting for memory, or little memory left appear, and then waits, longer each time.
Grows slowly, and only while the time that a step waits for records falls by it.
"""

from dataclasses import dataclass
from typing import Any

from .pressure import Pressure

INTERVAL_S = 1.0  # between two looks
_MAX_FAULTS_PER_S = 20.0
_MAX_STALLED_SHARE = 0.05  # of the time, some task waited for memory
_RESERVE_SHARE = 16  # a 16th of what there was at the start is left alone
_SHRINK = 0.75
_GROW_SHARE = 16  # one step up is a 16th of the ceiling
_FIRST_WAIT_S, _MAX_WAIT_S = 10.0, 320.0
_WORTH = 0.98  # a step up that leaves more of the waiting than this was not worth it
_CHANGED = 1.25  # so much more waiting than when it settled: the text has changed
_IDLE = 0.02  # share of the time spent waiting for records that is not worth memory


@dataclass(frozen=True, slots=True)
class Signals:
    """What a look sees. `stall_s`: sum of the time in which nothing could be computed for want of a
    record; `busy_s`: sum of the time spent computing tokens, that included."""

    now_s: float
    busy_s: float
    stall_s: float
    pressure: Pressure


class Governor:
    """One pool's. `capacity` starts at `start` bytes and stays within `least` .. `most`."""

    def __init__(self, least: int, most: int, start: int, first: Signals) -> None:
        self.least, self.most = least, max(least, most)
        self.capacity = min(max(start, least), self.most)
        self.num_shrinks = self.num_grows = 0
        self.reason = ""
        available = first.pressure.available_bytes
        self._reserve = 0 if available is None else available // _RESERVE_SHARE
        self._last = first
        self._wait_s, self._wait_until_s = _FIRST_WAIT_S, first.now_s
        self._share_before: float | None = None  # of waiting, before the last step up
        self._settled_at: float | None = None  # share of waiting when growing was given up
        self._vain = 0  # steps up in a row that were not worth it

    def is_due(self, now_s: float) -> bool:
        return now_s - self._last.now_s >= INTERVAL_S

    def step(self, signals: Signals) -> int:
        """The capacity from now on."""
        last, self._last = self._last, signals
        elapsed = max(1e-9, signals.now_s - last.now_s)
        short = self._shortage(last, signals, elapsed)
        if short:
            self._shrink(short, signals)
            return self.capacity
        busy = signals.busy_s - last.busy_s
        if busy < 0.1 * elapsed:
            return self.capacity  # nothing was learnt
        share = (signals.stall_s - last.stall_s) / busy
        self._judge(share)
        if self._may_grow(share, signals):
            self._share_before = share
            self.capacity = min(self.most, self.capacity + max(1, self.most // _GROW_SHARE))
            self.num_grows += 1
        return self.capacity

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the report."""
        return {
            "capacity_bytes": self.capacity,
            "least_bytes": self.least,
            "most_bytes": self.most,
            "shrinks": self.num_shrinks,
            "grows": self.num_grows,
            "last_reason": self.reason,
        }

    def _shortage(self, last: Signals, now: Signals, elapsed: float) -> str:
        """Why memory is short, or nothing."""
        a, b = last.pressure, now.pressure
        if a.major_faults is not None and b.major_faults is not None:
            faults = (b.major_faults - a.major_faults) / elapsed
            if faults > _MAX_FAULTS_PER_S:
                return f"{faults:.0f} major faults a second"
        if a.stalled_s is not None and b.stalled_s is not None:
            stalled = (b.stalled_s - a.stalled_s) / elapsed
            if stalled > _MAX_STALLED_SHARE:
                return f"{100 * stalled:.0f} % of the time waiting for memory"
        if b.available_bytes is not None and b.available_bytes < self._reserve:
            return f"{b.available_bytes} bytes of memory left"
        return ""

    def _shrink(self, reason: str, signals: Signals) -> None:
        available = signals.pressure.available_bytes
        wanted = int(self.capacity * _SHRINK)
        if available is not None:  # at once as much as is missing
            wanted = min(wanted, self.capacity - (self._reserve - available))
        new = max(self.least, min(wanted, self.capacity))
        if new < self.capacity:
            self.num_shrinks += 1
            self.reason = reason
        self.capacity = new
        self._wait_until_s = signals.now_s + self._wait_s
        self._wait_s = min(_MAX_WAIT_S, 2 * self._wait_s)
        self._share_before = self._settled_at = None
        self._vain = 0

    def _judge(self, share: float) -> None:
        """Whether the last step up was worth its memory; give up after two that were not."""
        if self._share_before is not None:
            self._vain = self._vain + 1 if share > _WORTH * self._share_before else 0
            self._share_before = None
            if self._vain >= 2:
                self._settled_at, self._vain = share, 0
        if self._settled_at is not None and share > _CHANGED * self._settled_at:
            self._settled_at = None

    def _may_grow(self, share: float, signals: Signals) -> bool:
        available = signals.pressure.available_bytes
        step = max(1, self.most // _GROW_SHARE)
        return (
            self.capacity < self.most
            and share > _IDLE
            and self._settled_at is None
            and signals.now_s >= self._wait_until_s
            and (available is None or available - step > 2 * self._reserve)
        )
