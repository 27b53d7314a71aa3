"""What a set saves in reads, before it is used: routings replayed through the eviction policy.

Routings come from running a text with and without the set, or from a recorded trace, of which the
picks that go have to be given to others first: nobody recorded what the router liked next best.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.policy import DEFAULT_POLICY, make_policy

NOBODY = -1


@dataclass(frozen=True, slots=True)
class Replay:
    """One routing in one expert cache, from empty; `bytes_per_token` are read."""

    cache_bytes: int
    num_tokens: int
    hits: int
    misses: int
    bytes_read: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / max(1, self.num_tokens)


def replay(
    routes: NDArray[np.integer],
    num_experts: Sequence[int],
    num_bytes: Sequence[int],
    cache_bytes: int,
    policy: str = DEFAULT_POLICY,
) -> Replay:
    """Decode `routes` [T, places, K], -1 for none, token by token in a cache of so many bytes.

    `num_experts` by place; `num_bytes` of every record in (place, expert) order. The first half
    warms the cache up, the second half is counted. A layer's records must fit together.
    """
    first = np.concatenate(([0], np.cumsum(num_experts)[:-1]))
    place_of_key = np.repeat(np.arange(len(num_experts)), num_experts)
    eviction = make_policy(policy, place_of_key.tolist(), len(num_experts))
    is_resident = np.zeros(len(place_of_key), dtype=np.bool_)
    blocked = np.ones(len(place_of_key), dtype=np.bool_)
    used = hits = misses = bytes_read = 0
    for token, row in enumerate(routes):
        counts = token >= len(routes) // 2
        for place, ids in enumerate(row):
            keys = (ids[ids != NOBODY] + first[place]).astype(np.int64)
            missing = keys[~is_resident[keys]].tolist()
            hits += counts * (len(keys) - len(missing))
            misses += counts * len(missing)
            blocked[keys] = True
            needed = sum(num_bytes[key] for key in missing)
            bytes_read += counts * needed
            if used + needed > cache_bytes:
                for victim in eviction.victims(place, blocked):
                    is_resident[victim], blocked[victim] = False, True
                    eviction.remove(victim)
                    used -= num_bytes[victim]
                    if used + needed <= cache_bytes:
                        break
            used += needed
            is_resident[missing] = True
            eviction.touch(keys, token)
            for key in missing:
                eviction.insert(key)
            blocked[keys] = False
    return Replay(cache_bytes, len(routes) - len(routes) // 2, hits, misses, bytes_read)


def redirect(
    routes: NDArray[np.integer],
    kept: Mapping[int, Sequence[int]],
    weights: Mapping[int, NDArray[np.float64]],
    seed: int = 0,
) -> NDArray[np.int64]:
    """`routes` [T, places, K] with every pick that goes given to a kept expert that its token did
    not pick, at random with odds `weights` [E]. `kept` and `weights` by layer, in the order of the
    places. An estimate: a router would choose more alike, so hits come out too low."""
    rng = np.random.default_rng(seed)
    result = routes.astype(np.int64).copy()
    for place, layer in enumerate(kept):
        is_kept = np.zeros(len(weights[layer]), dtype=np.bool_)
        is_kept[list(kept[layer])] = True
        ids = result[:, place]
        is_lost = (ids != NOBODY) & ~is_kept[ids]
        rows = np.flatnonzero(is_lost.any(axis=1))
        odds = np.log(np.maximum(weights[layer], 1e-9))
        # The largest of odds + Gumbel noise is a draw by the odds; so are the next largest.
        drawn = odds + rng.gumbel(size=(len(rows), len(odds)))
        drawn[:, ~is_kept] = -np.inf
        for row, scores in zip(rows, drawn, strict=True):
            stays = ids[row][~is_lost[row] & (ids[row] != NOBODY)]
            scores[stays] = -np.inf
            lost = np.flatnonzero(is_lost[row])
            best = np.argsort(-scores)[: len(lost)]
            ids[row, lost] = np.where(np.isneginf(scores[best]), NOBODY, best)
    return result


def pick_share_in_memory(
    shares: Sequence[NDArray[np.float64]], num_bytes: Sequence[int], cache_bytes: int
) -> float:
    """Share of picks that go to the most picked experts that fit (per byte), where those stay in
    memory for good: what counts alone can tell. `shares` [E] of each place add up to 1."""
    every = np.concatenate(shares) / len(shares)
    sizes = np.asarray(num_bytes)
    order = np.argsort(-every / sizes, kind="stable")
    fits = np.cumsum(sizes[order]) <= cache_bytes
    return float(every[order][fits].sum())
