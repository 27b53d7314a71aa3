"""What a set saves in reads, before it is used: routings without the picks that go.

A recorded routing has to be changed before it is replayed: its picks that go are given to others,
since nobody recorded what the router liked next best. Counts alone give a simpler bound.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NOBODY = -1


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
