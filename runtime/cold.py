"""Leaving out absent records that a token gives little weight; the twin of `Decoder::drop_cold`.
Floor 1.

The output then depends on what was in memory when the token came.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_EXPERT = -1


@dataclass(slots=True)
class ColdRule:
    """Absent records of less than `share` of a token's routing weights are left out, as long as no
    more than `max_dropped` of all records are; of a token's experts, the largest stays."""

    share: float = 0.0  # 0: none is
    max_dropped: float = 0.0
    num_picks: int = 0
    num_dropped: int = 0

    def left_of(
        self,
        ids: NDArray[np.integer],
        weights: NDArray[np.float32],
        addresses: Callable[[Sequence[int]], Sequence[int]],
        first_key: int,
        stand_in_step: int = 0,
    ) -> tuple[NDArray[np.integer], NDArray[np.float32]]:
        """The routes [K] of one token and layer, ascending, then -1, without what goes.

        `stand_in_step`: how far the stand-in of a record is behind it, 0: it has none; where that
        is in memory the record stays.
        """
        ids, weights = ids.copy(), weights.copy()
        active = np.flatnonzero(ids >= 0)
        self.num_picks += len(active)
        if not len(active):
            return ids, weights
        keys = ids[active] + first_key
        is_cold = np.array(addresses(keys.tolist())) == 0
        if stand_in_step:
            is_cold &= np.array(addresses((keys + stand_in_step).tolist())) == 0
        is_cold &= weights[active] < np.float32(self.share) * weights[active].sum()
        is_cold &= weights[active] < weights[active].max()
        cold = active[is_cold]
        room = int(self.max_dropped * self.num_picks) - self.num_dropped
        gone = cold[np.argsort(weights[cold], kind="stable")][: max(0, room)]
        self.num_dropped += len(gone)
        stays = np.setdiff1d(active, gone)
        left_ids, left_weights = np.full_like(ids, NO_EXPERT), np.zeros_like(weights)
        left_ids[: len(stays)], left_weights[: len(stays)] = ids[stays], weights[stays]
        return left_ids, left_weights
