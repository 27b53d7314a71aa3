"""Which resident record goes when room is needed. Floor 1.

Pure bookkeeping: no I/O, no memory, no knowledge of what is resident. A policy sees demand
(`touch`), arrivals (`insert`) and departures (`remove`), and orders for eviction the keys that the
cache does not block. Keys are dense integers; layers are places in the cycle of MoE layers, 0 to
L - 1.

Why `forecast` is the default: hit rates on recorded routings, decode only, one pool, by the share
of all experts that fits. One token's cycle is .047 of the experts of Qwen3-30B-A3B (left) and .016
of those of gpt-oss-120b (right).

    share       .03    .05    .08    .125   .25         .03    .05    .08    .125
    Belady      .450   .574   .686   .784   .895        .546   .632   .692   .720
    LRU         .000   .377   .445   .577   .813        .293   .439   .539   .617
    cycle       .278   .374   .491   .624   .831        .350   .455   .548   .643
    forecast    .304   .409   .527   .648   .834        .349   .466   .557   .635
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .policy_forecast import Forecast
from .policy_lowest import NO_VICTIM, ByDistance, Lowest, Policy

__all__ = ["NO_VICTIM", "Policy"]
HALF_LIFE = 16.0  # tokens; CycleAware says why
_RESCALE_AT = 512.0  # half-lives between rescalings; float64 overflows after 1,023


class Lru(Lowest):
    """The record not used for longest. Hits nothing below one token's cycle."""

    def _score(self, layer: int, scores: NDArray[np.float64]) -> None:
        np.copyto(scores, self._last_use)


class Fifo(Lowest):
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


class Lfu(Lowest):
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


class CycleAware(ByDistance):
    """The record with the lowest decayed frequency / distance to its layer: EdgeMoE's eviction.

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
        self._base_step = 0

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
            self._value *= 2.0**-exponent
            self._base_step, exponent = step, 0.0
        weight = 2.0**exponent
        if counts is None:
            self._value[keys] += weight
        else:  # as if the uses were spread evenly over the tokens
            decay = 2.0 ** (-1.0 / self._half_life)
            weight *= (1.0 - decay**num_tokens) / (1.0 - decay) / num_tokens
            self._value[keys] += weight * counts


POLICIES: dict[str, type[Lowest]] = {
    "forecast": Forecast,
    "cycle": CycleAware,
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
}
DEFAULT_POLICY = "forecast"


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
