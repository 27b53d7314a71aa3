"""Which resident record goes when room is needed. Floor 1.

Pure bookkeeping: no I/O, no memory, no knowledge of what is resident. A policy sees demand
(`touch`), arrivals (`insert`) and departures (`remove`), and orders for eviction the keys that the
cache does not block. Keys are dense integers; layers are places in the cycle of MoE layers, 0 to
L - 1.

Why cycle-aware is the default: hit rates on recorded routings, decode only, one pool, by the share
of all experts that fits. One token's cycle is .047 of the experts of Qwen3-30B-A3B (left) and .016
of those of gpt-oss-120b (right).

    share     .03    .05    .08    .125   .25         .03    .05    .08    .125
    Belady    .449   .574   .686   .785   .895        .546   .632   .692   .720
    LRU       .000   .377   .446   .578   .816        .293   .439   .539   .617
    cycle     .280   .376   .494   .627   .833        .350   .455   .548   .643
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

NO_VICTIM = -1
HALF_LIFE = 16.0  # tokens; CycleAware says why
_RESCALE_AT = 512.0  # half-lives between rescalings; float64 overflows after 1,023


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

    def insert(self, key: int) -> None:
        """The key was given memory."""

    def remove(self, key: int) -> None:
        """The key lost its memory. What is known of its demand stays known."""

    def victims(self, layer: int, blocked: NDArray[np.bool_]) -> Iterator[int]:
        """The keys not blocked, in the order to evict them while `layer` runs.

        Good as long as nothing but `remove` is called; later changes of `blocked` are not seen.
        """


class _Lowest:
    """Evicts the key with the lowest score; ties go to the one not used for longest."""

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

    def insert(self, key: int) -> None:
        pass

    def remove(self, key: int) -> None:
        pass

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        raise NotImplementedError

    def victims(self, layer: int, blocked: NDArray[np.bool_]) -> Iterator[int]:
        scores = self._scratch
        self._score(layer, scores)
        np.copyto(scores, np.inf, where=blocked)
        while True:
            key = int(scores.argmin())
            lowest = scores[key]
            if lowest == np.inf:
                return
            is_lowest = scores == lowest
            if np.count_nonzero(is_lowest) > 1:
                ties = is_lowest.nonzero()[0]
                key = int(ties[self._last_use[ties].argmin()])
            yield key
            scores[key] = np.inf

    def victim(self, layer: int, blocked: NDArray[np.bool_]) -> int:
        """The first of `victims`, or NO_VICTIM."""
        return next(self.victims(layer, blocked), NO_VICTIM)


class Lru(_Lowest):
    """The record not used for longest. Hits nothing below one token's cycle."""

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        np.copyto(scores, self._last_use)


class Fifo(_Lowest):
    """The record that arrived first."""

    def __init__(self, layer_of_key: Sequence[int], num_layers: int) -> None:
        super().__init__(layer_of_key, num_layers)
        self._arrival = np.zeros(len(self._layer_of_key), dtype=np.float64)
        self._num_arrivals = 0

    def insert(self, key: int) -> None:
        self._num_arrivals += 1
        self._arrival[key] = self._num_arrivals

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        np.copyto(scores, self._arrival)


class Lfu(_Lowest):
    """The record wanted by the fewest tokens since the start."""

    def __init__(self, layer_of_key: Sequence[int], num_layers: int) -> None:
        super().__init__(layer_of_key, num_layers)
        self._frequency = np.zeros(len(self._layer_of_key), dtype=np.float64)

    def touch(
        self,
        keys: NDArray[np.int64],
        step: int,
        num_tokens: int = 1,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        super().touch(keys, step)
        self._frequency[keys] += 1 if counts is None else counts

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        np.copyto(scores, self._frequency)


class CycleAware(_Lowest):
    """The record with the lowest decayed frequency / distance to its layer.

    Distance d = (layer of the record - running layer) mod L, and L for the running layer itself:
    what runs next stays, what has just run goes (EdgeMoE's term, in the direction of its prose).

    The frequency halves every `half_life` tokens. 16 is the middle of a flat optimum: 8 is best by
    .005 on recordings of 64-128 tokens, 16-32 on 2,048 tokens of text.
    """

    def __init__(
        self, layer_of_key: Sequence[int], num_layers: int, half_life: float = HALF_LIFE
    ) -> None:
        super().__init__(layer_of_key, num_layers)
        self._half_life = half_life
        # Frequencies grow instead of decaying: a use at step s weighs 2 ** (s / half_life), which
        # orders the keys alike and touches only the keys in use.
        self._frequency = np.zeros(len(self._layer_of_key), dtype=np.float64)
        self._base_step = 0
        self._nearness = np.empty(len(self._layer_of_key), dtype=np.float64)
        self._nearness_layer = -1
        # 1 / distance from the layer at position L, twice around: a slice of it serves any layer.
        cycle = np.concatenate(([num_layers], np.arange(1, num_layers)))
        self._inverse = 1.0 / np.concatenate((cycle, cycle))

    def touch(
        self,
        keys: NDArray[np.int64],
        step: int,
        num_tokens: int = 1,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        super().touch(keys, step)
        exponent = (step - self._base_step) / self._half_life
        if exponent > _RESCALE_AT:
            self._frequency *= 2.0**-exponent
            self._base_step, exponent = step, 0.0
        weight = 2.0**exponent
        if counts is None:
            self._frequency[keys] += weight
        else:  # as if the uses were spread evenly over the tokens
            decay = 2.0 ** (-1.0 / self._half_life)
            weight *= (1.0 - decay**num_tokens) / (1.0 - decay) / num_tokens
            self._frequency[keys] += weight * counts

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        if layer != self._nearness_layer:
            start = self._num_layers - layer
            by_layer = self._inverse[start : start + self._num_layers]
            np.take(by_layer, self._layer_of_key, out=self._nearness, mode="clip")
            self._nearness_layer = layer
        np.multiply(self._frequency, self._nearness, out=scores)


POLICIES: dict[str, type[_Lowest]] = {"lru": Lru, "lfu": Lfu, "fifo": Fifo, "cycle": CycleAware}
DEFAULT_POLICY = "cycle"


def check_policy(name: str) -> None:
    """UsageError for a name that no policy has."""
    if name not in POLICIES:
        raise UsageError(
            f"unknown eviction policy `{name}`",
            f"expected one of {', '.join(sorted(POLICIES))}",
            f"leave it out for the default, `{DEFAULT_POLICY}`",
        )


def make_policy(name: str, layer_of_key: Sequence[int], num_layers: int) -> Policy:
    """The policy called `name` for keys whose places in the layer cycle are `layer_of_key`."""
    check_policy(name)
    return POLICIES[name](layer_of_key, num_layers)
