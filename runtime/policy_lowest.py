"""What the expert cache asks of an eviction policy, and what ours have in common. Floor 1."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .policy_guard import Guard

NO_VICTIM = -1


class Policy(Protocol):
    """What the expert cache asks of an eviction policy."""

    def touch(
        self,
        keys: NDArray[np.int64],
        step: int,
        num_tokens: int = 1,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        """`keys` [n] are demanded by the `num_tokens` tokens that end with number `step`.

        `counts` says how many of those tokens want each key; None is one each. `keys` [m, n]: m
        demands of one token one after the other, no key in two of them.
        """

    def route(self, place: int, routes: NDArray[np.integer], step: int) -> None:
        """What touches at `step` will sum up: the experts `routes` [T, K], -1: none, of T tokens at
        the layer that is the `place`-th."""

    def expect(self, keys: NDArray[np.int64]) -> None:
        """`keys` [n] will be touched together, as soon as there is room for those absent."""

    def seed(self, keys: NDArray[np.int64], step: int, counts: NDArray[np.floating]) -> None:
        """Each of `keys` counts as if it had been wanted so often just now."""

    def insert(self, key: int) -> None:
        """The key was given memory."""

    def remove(self, key: int) -> None:
        """The key lost its memory. What is known of its demand stays known."""

    def set_sizes(self, sizes: Sequence[int]) -> None:
        """Bytes of the record of each key; without a call all are equal."""

    def set_share(self, share: float) -> None:
        """The capacity has become this share of all records."""

    def victims(self, layer: int, blocked: NDArray[np.bool_], num_tokens: int = 1) -> Iterator[int]:
        """The keys not blocked, in the order to evict them while `num_tokens` tokens go through
        `layer` together.

        Good as long as nothing but `remove` is called; later changes of `blocked` are not seen.
        """


class Lowest(Policy):
    """Evicts the key with the lowest score; ties go to the one not used for longest.

    With a `guard`, records that it would keep go last while it says so.
    """

    guard: Guard | None = None

    def __init__(self, layer_of_key: Sequence[int], num_layers: int) -> None:
        self._layer_of_key = np.asarray(layer_of_key, dtype=np.int64)
        self._num_layers = num_layers
        num_keys = len(self._layer_of_key)
        self._last_use = np.full(num_keys, -1, dtype=np.int64)
        self._clock = 0
        self._scratch = np.empty(num_keys, dtype=np.float64)

    def touch(
        self,
        keys: NDArray[np.int64],
        step: int,
        num_tokens: int = 1,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        if keys.ndim == 1:
            self._clock += 1
            self._last_use[keys] = self._clock
        else:
            clocks = np.arange(self._clock + 1, self._clock + 1 + len(keys))
            self._last_use[keys] = clocks[:, None]
            self._clock += len(keys)
        if self.guard is not None:
            for row in keys.reshape(-1, keys.shape[-1]):
                self.guard.touch(row)

    def route(self, place: int, routes: NDArray[np.integer], step: int) -> None:
        pass

    def expect(self, keys: NDArray[np.int64]) -> None:
        if self.guard is not None:
            self.guard.expect(keys)

    def seed(self, keys: NDArray[np.int64], step: int, counts: NDArray[np.floating]) -> None:
        guard, self.guard = self.guard, None  # nothing is demanded
        self.touch(keys, step, counts=counts)
        self.guard = guard

    def insert(self, key: int) -> None:
        if self.guard is not None:
            self.guard.insert(key)

    def remove(self, key: int) -> None:
        if self.guard is not None:
            self.guard.remove(key)

    def set_sizes(self, sizes: Sequence[int]) -> None:
        if self.guard is not None:
            self.guard = Guard(sizes)

    def set_share(self, share: float) -> None:
        if self.guard is not None:
            self.guard.set_share(share)

    def scores(self, layer: int) -> NDArray[np.float64]:
        """By key, while `layer` runs; the array is used again by the next call."""
        self._score(layer, self._scratch)
        return self._scratch

    @property
    def last_use(self) -> NDArray[np.int64]:
        """Number of the last demand by key, -1: none."""
        return self._last_use

    @abstractmethod
    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        """Write the scores by key while `layer` runs."""

    def _foresee(self, layer: int, scores: NDArray[np.float64], num_tokens: int) -> bool:
        """Change `scores` where a prompt has yet to reach a record; False: nothing is known."""
        return False

    def victims(self, layer: int, blocked: NDArray[np.bool_], num_tokens: int = 1) -> Iterator[int]:
        scores = self._scratch
        self._score(layer, scores)
        is_prompt = num_tokens > 1 and self._foresee(layer, scores, num_tokens)
        np.copyto(scores, np.inf, where=blocked)
        while True:
            spared = scores
            if self.guard is not None and not is_prompt and not self.guard.is_free:
                spared = np.where(self.guard.in_shadow, np.inf, scores)
                if spared.min() == np.inf:  # of a demand larger than the pool
                    spared = scores
            key = int(spared.argmin())
            lowest = spared[key]
            if lowest == np.inf:
                return
            is_lowest = spared == lowest
            if np.count_nonzero(is_lowest) > 1:
                ties = is_lowest.nonzero()[0]
                key = int(ties[self._last_use[ties].argmin()])
            yield key
            scores[key] = np.inf

    def victim(self, layer: int, blocked: NDArray[np.bool_]) -> int:
        """The first of `victims`, or NO_VICTIM."""
        return next(self.victims(layer, blocked), NO_VICTIM)


class ByDistance(Lowest):
    """Evicts the key with the lowest value x nearness of its layer.

    Distance d = (layer of the record - running layer) mod L, and L for the running layer itself:
    what runs next stays, what has just run goes (EdgeMoE's term, in the direction of its prose).
    """

    def __init__(self, layer_of_key: Sequence[int], num_layers: int) -> None:
        super().__init__(layer_of_key, num_layers)
        self._value = np.zeros(len(self._layer_of_key), dtype=np.float64)
        self._nearness = np.empty(len(self._layer_of_key), dtype=np.float64)
        self._nearness_layer = -1
        # Seen from the layer at position L, twice around: a slice of it serves any layer.
        cycle = [self.nearness(ahead) for ahead in (num_layers, *range(1, num_layers))]
        self._cycle = np.array(cycle + cycle)

    def nearness(self, ahead: int) -> float:
        """Of a layer `ahead` of the running one, 1 .. L."""
        return 1.0 / ahead

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        if layer != self._nearness_layer:
            start = self._num_layers - layer
            by_layer = self._cycle[start : start + self._num_layers]
            np.take(by_layer, self._layer_of_key, out=self._nearness, mode="clip")
            self._nearness_layer = layer
        np.multiply(self._value, self._nearness, out=scores)
