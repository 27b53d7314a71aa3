"""S3-FIFO (Yang et al., SOSP 2023), to compare with in replays. Floor 1.

A new record enters the small queue, a tenth of the pool; one that was wanted again there, or came
back soon after it had left, goes to the main queue, in which every use is one more round.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_MAX_USES = 3
_SMALL_SHARE = 0.1


class S3Fifo:
    """A `Policy`; the queues are ordered by key from the oldest to the newest."""

    def __init__(self, layer_of_key: Sequence[int], num_layers: int) -> None:
        self._small: OrderedDict[int, None] = OrderedDict()
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses = [0] * len(layer_of_key)

    def touch(
        self,
        keys: NDArray[np.int64],
        step: int,
        num_tokens: int = 1,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        for key in keys.reshape(-1).tolist():
            if key in self._small or key in self._main:
                self._uses[key] = min(self._uses[key] + 1, _MAX_USES)

    def insert(self, key: int) -> None:
        self._uses[key] = -1  # the demand that brought it follows
        queue = self._main if key in self._ghosts else self._small
        self._ghosts.pop(key, None)
        queue[key] = None

    def remove(self, key: int) -> None:
        self._main.pop(key, None)
        if key in self._small:
            del self._small[key]
            self._ghosts[key] = None
            while len(self._ghosts) > len(self._main) + len(self._small):
                self._ghosts.popitem(last=False)

    def set_share(self, share: float) -> None:
        pass

    def victims(self, layer: int, blocked: NDArray[np.bool_]) -> Iterator[int]:
        held: set[int] = set()  # blocked, seen once
        while len(held) < len(self._small) + len(self._main):
            size = len(self._small) + len(self._main)
            from_small = len(self._small) > _SMALL_SHARE * size or not self._main
            queue = self._small if from_small else self._main
            if held.issuperset(queue):
                queue = self._main if from_small else self._small
            key = next(iter(queue))
            if blocked[key]:
                held.add(key)
                queue.move_to_end(key)
            elif queue is self._small and self._uses[key] > 0:
                del self._small[key]
                self._main[key], self._uses[key] = None, 0
            elif queue is self._main and self._uses[key] > 0:
                self._uses[key] -= 1
                self._main.move_to_end(key)
            else:
                yield key
