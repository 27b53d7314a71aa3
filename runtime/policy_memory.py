"""The routing of past tokens, for the default eviction policy. Floor 1.

Twin of `Memory` in runtime/csrc/cache_forecast.cpp, with the same bits.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
WINDOW = 1024  # tokens remembered
KEPT = (0.25, 0.75)  # of what a token's predecessors shared, one turn further back
_MAX_MATCHES = 16  # of each
_LEVELS = F32(64.0)
_MIN_LEVEL = 24  # of the best match's likeness, in 64ths
_AGES = 8  # tokens of a chunk that count for the likeness to its last one


def sum_in_order(values: NDArray[np.float32]) -> np.float32:
    """One after the other."""
    return np.cumsum(values, dtype=F32)[-1]


class RoutingMemory:
    """The routing of the last tokens, and how alike each of them is to the running one.

    A past token's likeness is the number of experts that it shares with the running token, plus a
    part of what their predecessors shared, and so on: a small part finds the same few tokens, a
    large one the same passage.
    """

    def __init__(self, num_experts: Sequence[int]) -> None:
        num_places = len(num_experts)
        self._used = [np.zeros((WINDOW, n), dtype=np.bool_) for n in num_experts]
        self._token = np.full((num_places, WINDOW), -1, dtype=np.int64)  # of each slot
        self._likeness = np.zeros((len(KEPT), WINDOW), dtype=F32)  # by slot: token modulo WINDOW

    def begin_tokens(self, token: int, num_tokens: int) -> None:
        """The tokens up to `token`."""
        left = np.array([[kept**num_tokens] for kept in KEPT], dtype=F32)
        self._likeness = np.roll(self._likeness, num_tokens, axis=1) * left
        self._likeness[:, token % WINDOW] = 0.0

    def forget_likeness(self) -> None:
        """What comes was not seen token by token."""
        self._likeness[:] = 0.0

    def add(self, place: int, token: int, picks: NDArray[np.int64], age: int = 0) -> None:
        """`age`: tokens between this one and the running one."""
        slot, used = token % WINDOW, self._used[place]
        used[slot] = False
        if age < _AGES:
            shared = np.roll(used[:, picks].sum(axis=1, dtype=np.int32).astype(F32), age)
            self._likeness += shared * np.array([[kept**age] for kept in KEPT], dtype=F32)
        used[slot, picks] = True
        self._token[place, slot] = token

    def matches(self, token: int, kind: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Past tokens most like the running one, the newest first, and their weights.

        `kind`: which of KEPT makes the likeness.
        """
        likeness = self._likeness[kind]
        best = likeness.max()
        if best <= 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=F32)
        levels = (likeness * (_LEVELS / best)).astype(np.int32)
        counts = np.bincount(levels, minlength=int(_LEVELS) + 1).tolist()
        level, num_above = int(_LEVELS), 0
        while level > _MIN_LEVEL and num_above + counts[level] < _MAX_MATCHES:
            num_above += counts[level]
            level -= 1
        slots = (levels >= level).nonzero()[0]
        ages = (token - 1 - slots) % WINDOW
        newest = ages.argsort()
        slots, ages = slots[newest], ages[newest]
        is_least = levels[slots] == level
        chosen = ~is_least | (np.cumsum(is_least) <= _MAX_MATCHES - num_above)
        weights = likeness[slots[chosen]] * (F32(1.0) / best)
        weights *= weights
        return token - 1 - ages[chosen], weights * weights * weights

    def followers(
        self,
        place: int,
        token: int,
        matches: tuple[NDArray[np.int64], NDArray[np.float32]],
        ahead: range,
    ) -> tuple[NDArray[np.float32], np.float32]:
        """Weights [E] of the experts that were used `ahead` tokens after those, and their sum."""
        tokens = (matches[0][:, None] + np.arange(ahead.start, ahead.stop)).reshape(-1)
        weights = np.repeat(matches[1], len(ahead))
        slots = tokens % WINDOW
        known = (tokens <= token) & (self._token[place, slots] == tokens)
        if not known.any():
            return np.zeros(self._used[place].shape[1], dtype=F32), F32(0.0)
        votes = self._used[place][slots[known]] * weights[known, None]
        return np.cumsum(votes, axis=0, dtype=F32)[-1], sum_in_order(weights[known])
