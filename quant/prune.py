"""Which experts of a store a task can do without: scores that need no training, and the choice.

Scores per layer, from a profile of the task (runtime/profile.py):

- frequency: how often the expert was picked (SEER-MoE's heavy hitters, 2404.05089)
- soft-count: the sum of its softmax over all tokens, picked or not (the same, soft)
- reap: the mean of routing weight x norm of the expert's output over the tokens that picked it
  (REAP, 2510.13999); an expert that nobody picked scores 0

Layers are compared by share: a score over the sum of its layer. Ties go to the lower id.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.amounts import format_bytes
from ..runtime.errors import BudgetError, UsageError
from ..runtime.index import StoreIndex
from ..runtime.profile import Profile

METHODS = ("reap", "frequency", "soft-count")
Scores = Mapping[int, NDArray[np.float64]]  # by MoE layer, [E]
Kept = dict[int, tuple[int, ...]]  # by MoE layer, ids ascending


@dataclass(frozen=True, slots=True)
class Amount:
    """How much stays: one of `share` (0 to 1 of the experts), `experts` (of each layer) and
    `num_bytes` (of records). `keep_first`: the first MoE layer stays whole, beside that amount; so
    do the layers `whole`."""

    share: float | None = None
    experts: int | None = None
    num_bytes: int | None = None
    keep_first: bool = False
    whole: frozenset[int] = frozenset()

    def whole_layers(self, layers: Iterable[int]) -> frozenset[int]:
        """Those of these MoE layers, ascending, that stay whole."""
        first = next(iter(layers))
        return self.whole | {first} if self.keep_first else self.whole


def scores_of(profile: Profile, method: str) -> dict[int, NDArray[np.float64]]:
    """The scores of every layer. Raises UsageError where the profile has not what they need."""
    result = {}
    for layer, sums in profile.layers.items():
        hard = sums.hard_count.astype(np.float64)
        if method == "frequency":
            result[layer] = hard
        elif method == "soft-count":
            result[layer] = _need(sums.soft_count, "sums of routing probabilities")
        elif method == "reap":
            result[layer] = _need(sums.reap_sum, "norms of expert outputs") / np.maximum(hard, 1)
        else:
            raise UsageError(
                f"unknown pruning method `{method}`", f"expected one of {', '.join(METHODS)}"
            )
    return result


def _need(values: NDArray[np.float64] | None, what: str) -> NDArray[np.float64]:
    if values is None:
        raise UsageError(
            f"this profile has no {what}", "", "calibrate again, or use --method frequency"
        )
    return values


def choose(
    scores: Scores, index: StoreIndex, top_k: int, amount: Amount, by_layer: bool = True
) -> Kept:
    """The experts that stay. `by_layer`: of every layer as many, save for bytes that this would
    leave over, which go to the best of the others; else the best of all layers, each keeping
    `top_k` at least. Raises UsageError and BudgetError for amounts that cannot be."""
    whole = amount.whole_layers(scores)
    order = {layer: _ranked(values) for layer, values in scores.items()}
    least = {
        layer: len(ranks) if layer in whole else min(top_k, len(ranks))
        for layer, ranks in order.items()
    }
    room = _Room(scores, index, order, least)
    if amount.num_bytes is not None:
        if room.kept_bytes > amount.num_bytes:
            missing = room.kept_bytes - amount.num_bytes
            raise BudgetError(
                "no set is small enough for this budget",
                f"{top_k} experts of every layer take {format_bytes(room.kept_bytes)}, "
                f"there is room for {format_bytes(amount.num_bytes)}",
                f"give {format_bytes(missing)} more",
            )
        if by_layer:
            room.fill_evenly(amount.num_bytes)
        room.fill(max_bytes=amount.num_bytes)
        return room.kept()
    counts = {layer: num_to_keep(amount, len(order[layer]), top_k) for layer in order}
    counts |= {layer: len(order[layer]) for layer in whole}
    if by_layer:
        return {layer: _ids(ranks[: counts[layer]]) for layer, ranks in order.items()}
    room.fill(max_experts=sum(counts.values()))
    return room.kept()


def num_to_keep(amount: Amount, num_experts: int, top_k: int) -> int:
    """How many of a layer's experts stay. Raises UsageError for fewer than `top_k`."""
    count = amount.experts if amount.experts is not None else round(amount.share * num_experts)
    if not top_k <= count <= num_experts:
        raise UsageError(
            f"{count} of {num_experts} experts cannot stay",
            f"every token needs {top_k}",
            f"keep {top_k} to {num_experts} of each layer",
        )
    return count


def _ranked(scores: NDArray[np.float64]) -> list[int]:
    """Expert ids, the best first."""
    return np.argsort(-scores, kind="stable").tolist()


def _ids(ranks: list[int]) -> tuple[int, ...]:
    return tuple(sorted(ranks))


class _Room:
    """A choice that grows: of every layer the best so many stay."""

    def __init__(
        self, scores: Scores, index: StoreIndex, order: dict[int, list[int]], least: dict[int, int]
    ) -> None:
        self._index, self._order = index, order
        self._share = {layer: s / max(s.sum(), 1e-300) for layer, s in scores.items()}
        self._kept = {layer: set(ranks[: least[layer]]) for layer, ranks in order.items()}
        self.kept_bytes = sum(
            self._bytes(layer, expert) for layer, ids in self._kept.items() for expert in ids
        )

    def kept(self) -> Kept:
        return {layer: tuple(sorted(ids)) for layer, ids in self._kept.items()}

    def _bytes(self, layer: int, expert: int) -> int:
        return self._index.records[layer, expert].num_bytes

    def _add(self, layer: int, expert: int) -> None:
        self._kept[layer].add(expert)
        self.kept_bytes += self._bytes(layer, expert)

    def fill_evenly(self, max_bytes: int) -> None:
        """One more of every layer as long as all of them fit."""
        for rank in range(max(map(len, self._order.values()))):
            following = [
                (layer, ranks[rank])
                for layer, ranks in self._order.items()
                if rank < len(ranks) and ranks[rank] not in self._kept[layer]
            ]
            if self.kept_bytes + sum(self._bytes(*pair) for pair in following) > max_bytes:
                return
            for pair in following:
                self._add(*pair)

    def fill(self, max_bytes: int | None = None, max_experts: int | None = None) -> None:
        """The largest shares of any layer (per byte, where bytes are what counts) that fit."""
        left = {
            (layer, expert): rank
            for layer, ranks in self._order.items()
            for rank, expert in enumerate(ranks)
            if expert not in self._kept[layer]
        }

        def value(pair: tuple[int, int]) -> float:
            share = float(self._share[pair[0]][pair[1]])
            return share / self._bytes(*pair) if max_bytes is not None else share

        num_kept = sum(map(len, self._kept.values()))
        for pair in sorted(left, key=lambda pair: (-value(pair), left[pair], pair)):
            if max_experts is not None and num_kept >= max_experts:
                return
            if max_bytes is None or self.kept_bytes + self._bytes(*pair) <= max_bytes:
                self._add(*pair)
                num_kept += 1
