"""The default eviction policy: forecasts from what tokens like this one were followed by. Floor 1.

A record's worth is the expected discount of its next use: each cycle until then takes a fifth. What
will be used soon is worth its memory, what will be used late has to be read again anyway. Three
probabilities tell when that is: of use in the next turn of its layer, in each of the three behind
it, and in those after them. `policy_guard` bounds what a wrong forecast may lose against plain LRU.

A probability is a logistic regression, learned while it runs: each time a layer has run, its E
experts are E examples of used or not used. Its inputs, each the logarithm of a ratio to the average
expert, so that equal knowledge of all experts is 0:

- four frequencies that halve every 1, 4, 16 and 128 tokens: recency, habit, and what is between;
- what followed the past tokens whose routing was most like that of the last ones, by two measures
  of likeness (`policy_memory`).

Everything is done in float32 and with operations that IEEE 754 defines to the bit, in one fixed
order: runtime/csrc/cache_forecast.cpp gives the same bits. Logarithm and exponential are
piecewise linear, read off the bits of the number.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .policy_guard import Guard
from .policy_lowest import ByDistance
from .policy_memory import KEPT, WINDOW, RoutingMemory, sum_in_order

F32 = np.float32
HALF_LIVES = (1.0, 4.0, 16.0, 128.0)  # tokens
_MEMORY, _ONE = len(HALF_LIVES), len(HALF_LIVES) + len(KEPT)
NUM_INPUTS = _ONE + 1  # frequencies, memories, 1
_RATE = F32(0.1)  # of learning (AdaGrad)
_DOUBT = F32(0.2)  # share of the average expert in what the matches say
_NEXT, _LATER, _FAR = range(1, 2), range(2, 5), range(5, 9)  # tokens behind a match
_KEPT = 0.8  # of the worth of a use, for each cycle until then
_LANES = 8  # partial sums of a gradient


def log2(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Base 2, linear between powers of two; x > 0."""
    return x.view(np.int32).astype(F32) * F32(2.0**-23) - F32(127.0)


def exp2(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of `log2`, for |z| up to 30."""
    bits = (np.clip(z, F32(-30.0), F32(30.0)) + F32(127.0)) * F32(2.0**23)
    return bits.astype(np.int32).view(F32)


def _probability(z: NDArray[np.float32]) -> NDArray[np.float32]:
    odds = exp2(z)
    return odds / (odds + F32(1.0))


def _worth(
    chance: NDArray[np.float32], later: NDArray[np.float32], far: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Expected _KEPT ** (turns between the next one and the use), from the probabilities of use."""
    one, kept = F32(1.0), F32(_KEPT)
    unused = kept * (one - later)
    at_last = kept * far / (one - kept * (one - far))
    behind = kept * later * (one + unused + unused * unused) + unused * unused * unused * at_last
    return chance + (one - chance) * behind


class Forecast(ByDistance):
    """Evicts the record whose next use is expected latest, as far as its guard allows."""

    def __init__(self, layer_of_key: Sequence[int], num_layers: int) -> None:
        super().__init__(layer_of_key, num_layers)
        self.guard = Guard([1] * len(layer_of_key))
        places = np.asarray(layer_of_key, dtype=np.int64)
        self._first = np.searchsorted(places, np.arange(num_layers + 1))
        counts = np.diff(self._first)
        self._frequencies = [np.zeros((len(HALF_LIVES), n), dtype=F32) for n in counts]
        self._means = np.zeros((num_layers, len(HALF_LIVES)), dtype=F32)
        self._inputs: list[NDArray[np.float32] | None] = [None] * num_layers  # [NUM_INPUTS, E]
        self._memory = RoutingMemory(counts.tolist())
        self._weights = np.array([0.25] * _ONE + [0.0], dtype=F32)
        self._squares = np.ones(NUM_INPUTS, dtype=F32)
        self._has_bias = False
        self._next = np.zeros(len(places), dtype=F32)  # probability of use in the next turn
        self._token, self._event = -1, (-1, -1)  # (place, step) of the last demand
        self._routed = (-1, -1)  # the last one that was told token by token
        self._ages = np.empty((len(HALF_LIVES), 0), dtype=F32)  # weights of a chunk's tokens

    def nearness(self, ahead: int) -> float:
        return _KEPT ** (ahead / self._num_layers)

    def _foresee(self, layer: int, scores: NDArray[np.float64], num_tokens: int) -> bool:
        """Of records that the prompt has yet to reach, the chance that one of its tokens wants them
        counts, the tokens rounded up to a power of two: squaring rounds alike in the core."""
        none = np.maximum(0.0, 1.0 - self._value)
        for _ in range((num_tokens - 1).bit_length()):
            none *= none
        is_ahead = self._layer_of_key > layer
        np.multiply(1.0 - none, self._nearness, out=scores, where=is_ahead)
        return True

    def touch(
        self,
        keys: NDArray[np.int64],
        step: int,
        num_tokens: int = 1,
        counts: NDArray[np.int64] | None = None,
    ) -> None:
        super().touch(keys, step)
        for row in keys[None] if keys.ndim == 1 else keys:
            places = self._layer_of_key[row]
            for place in np.unique(places).tolist():
                here = places == place
                part = None if counts is None else np.asarray(counts, dtype=F32)[here]
                self._demand(place, row[here] - self._first[place], step, num_tokens, part)

    def route(self, place: int, routes: NDArray[np.integer], step: int) -> None:
        routes = np.sort(routes, axis=1)
        num_tokens, used = len(routes), routes >= 0
        used[:, 1:] &= routes[:, 1:] != routes[:, :-1]
        if not used.any():
            return
        self._begin(place, step, num_tokens)
        self._routed = self._event
        for age in range(min(num_tokens, WINDOW, self._token + 1) - 1, -1, -1):
            row = num_tokens - 1 - age
            self._memory.add(place, self._token - age, routes[row, used[row]], age)
        self._predict(place, self._count_rows(place, routes, used))

    def probabilities(self, place: int) -> NDArray[np.float32]:
        """Of use when the layer at `place` runs next, [E]."""
        return self._next[self._first[place] : self._first[place + 1]]

    # ---- inside ------------------------------------------------------------------------------

    def _demand(
        self,
        place: int,
        picks: NDArray[np.int64],
        step: int,
        num_tokens: int,
        counts: NDArray[np.float32] | None,
    ) -> None:
        is_token = counts is None
        if (not is_token and not counts.any()) or self._routed == (place, step):
            return
        is_new = self._begin(place, step, 1)
        num_uses = np.zeros(self._first[place + 1] - self._first[place], dtype=F32)
        num_uses[picks] = 1.0 if is_token else counts
        if is_token and is_new:
            if self._inputs[place] is not None:
                self._learn(self._inputs[place], num_uses, len(picks))
            self._memory.add(place, self._token, picks)
        elif not is_token:
            self._memory.forget_likeness()
        prior = self._count(place, num_uses, num_tokens, is_new)
        self._predict(place, prior, can_tell=is_token or num_tokens > 1)

    def _begin(self, place: int, step: int, num_tokens: int) -> bool:
        """A demand; False: the rest of one that came in parts, which adds to the first part."""
        if self._token < 0 or (place <= self._event[0] and step != self._event[1]):
            self._token += num_tokens
            self._memory.begin_tokens(self._token, num_tokens)
        is_new, self._event = self._event != (place, step), (place, step)
        return is_new

    def _count(
        self, place: int, num_uses: NDArray[np.float32], num_tokens: int, is_new: bool
    ) -> np.float32:
        """Add uses to the frequencies, spread evenly over the tokens; returns the mean use."""
        mean = sum_in_order(num_uses) / F32(len(num_uses))
        for i, half_life in enumerate(HALF_LIVES):
            decay, weight = F32(2.0 ** (-1.0 / half_life)), F32(1.0)
            if num_tokens > 1:
                left = 2.0 ** (-num_tokens / half_life)
                weight = F32((1.0 - left) / (1.0 - 2.0 ** (-1.0 / half_life)) / num_tokens)
                decay = F32(left)
            frequency = self._frequencies[place][i]
            if is_new:
                frequency *= decay
                self._means[place, i] *= decay
            frequency += num_uses * weight
            self._means[place, i] += mean * weight
        return mean / F32(num_tokens)

    def _count_rows(
        self, place: int, routes: NDArray[np.integer], used: NDArray[np.bool_]
    ) -> np.float32:
        """`_count` of a chunk's tokens one by one."""
        num_tokens = len(routes)
        if self._ages.shape[1] != num_tokens:
            ages = range(num_tokens - 1, -1, -1)
            weights = [[2.0 ** (-age / half_life) for age in ages] for half_life in HALF_LIVES]
            self._ages = np.array(weights, dtype=F32)
        frequencies, means = self._frequencies[place], self._means[place]
        num_experts = F32(frequencies.shape[1])
        num_uses, rows = used.sum(axis=1).astype(F32), used.nonzero()[0]
        for i, half_life in enumerate(HALF_LIVES):
            decay, weights = F32(2.0 ** (-num_tokens / half_life)), self._ages[i]
            frequencies[i] *= decay
            np.add.at(frequencies[i], routes[used], weights[rows])
            means[i] = sum_in_order(np.append(means[i] * decay, num_uses / num_experts * weights))
        return sum_in_order(num_uses) / num_experts / F32(num_tokens)

    def _predict(self, place: int, prior: np.float32, can_tell: bool = True) -> None:
        if can_tell and not self._has_bias:
            self._has_bias = True
            odds = prior / max(F32(1.0) - prior, F32(2.0**-10))
            self._weights[_ONE] = log2(np.array([odds], dtype=F32))[0]
        frequencies, means = self._frequencies[place], self._means[place]
        num_experts = frequencies.shape[1]
        inputs = self._inputs[place]
        if inputs is None:
            inputs = self._inputs[place] = np.zeros((NUM_INPUTS, num_experts), dtype=F32)
            inputs[_ONE] = 1.0
        for i in range(len(HALF_LIVES)):
            inputs[i] = log2(frequencies[i] + prior) - log2(np.array([means[i] + prior]))[0]
        habit = (frequencies[-1] + prior) / (means[-1] + prior) * prior
        matches = [self._memory.matches(self._token, kind) for kind in range(len(KEPT))]
        known, chances = inputs.copy(), []
        for ahead in (_NEXT, _LATER, _FAR):
            for kind, found in enumerate(known[_MEMORY:_ONE]):
                votes, total = self._memory.followers(place, self._token, matches[kind], ahead)
                found[:] = 0.0
                if total > 0:
                    doubt = total * _DOUBT
                    found[:] = log2((votes + doubt * habit) / (total + doubt)) - log2(habit)
            if ahead is _NEXT:
                inputs[:] = known
            chances.append(self._chances(known))
        part = slice(self._first[place], self._first[place + 1])
        self._next[part] = chances[0]
        self._value[part] = _worth(*chances)

    def _chances(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of use, [E]; the memories' inputs are added last."""
        z = self._weights[0] * inputs[0]
        for i in (*range(1, _MEMORY), _ONE, *range(_MEMORY, _ONE)):
            z = z + self._weights[i] * inputs[i]
        return _probability(z)

    def _learn(self, inputs: NDArray[np.float32], uses: NDArray[np.float32], num_uses: int) -> None:
        """One AdaGrad step towards the uses [E] of what the inputs [NUM_INPUTS, E] foretold."""
        errors = self._chances(inputs) - uses
        padding = -len(errors) % _LANES
        products = np.pad(inputs * errors, ((0, 0), (0, padding))).reshape(NUM_INPUTS, -1, _LANES)
        lanes = np.cumsum(products, axis=1, dtype=F32)[:, -1]
        gradient = np.cumsum(lanes, axis=1, dtype=F32)[:, -1] / F32(num_uses)
        self._squares += gradient * gradient
        self._weights -= _RATE * gradient / np.sqrt(self._squares)
