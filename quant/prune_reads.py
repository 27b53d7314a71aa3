"""Pruning that has reads in mind: what every expert would be read for, from counts alone.

A cache of the most recently used is nearly one that keeps each record for the same time T after
its use (Che, Tung, Wang, 2002). With p uses a token, a record misses p exp(-p T) times a token; T
is such that what is kept fills the cache. Experts that are used all the time hardly miss, nor do
those that are hardly used: what is read most lies between. Taking from an expert's share of its
layer's score a part of its share of the layer's reads lets those go that are not worth theirs.
"""

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UsageError
from ..runtime.index import StoreIndex
from ..runtime.profile import Profile
from .prune import Scores

_STEPS = 100  # halvings


def expected_reads(
    profile: Profile, index: StoreIndex, cache_bytes: int
) -> dict[int, NDArray[np.float64]]:
    """Expected misses a token of every expert, by layer [E], in an expert cache of this size."""
    layers = list(profile.layers)
    tokens = max(profile.num_tokens, 1)
    uses = np.concatenate([profile.layers[layer].hard_count / tokens for layer in layers])
    keys = [(layer, e) for layer in layers for e in range(profile.layers[layer].num_experts)]
    sizes = np.array([index.records[key].num_bytes for key in keys], dtype=np.float64)
    lowest, highest = 0.0, 1e9
    for _ in range(_STEPS):
        time = (lowest + highest) / 2
        kept = float((sizes * -np.expm1(-uses * time)).sum())
        lowest, highest = (time, highest) if kept < cache_bytes else (lowest, time)
    misses = uses * np.exp(-uses * lowest)
    ends = np.cumsum([profile.layers[layer].num_experts for layer in layers])
    return dict(zip(layers, np.split(misses, ends[:-1]), strict=True))


def spare_reads(scores: Scores, profile: Profile, index: StoreIndex, part: float) -> Scores:
    """`scores` as shares of their layers, less `part` (0 to below 1) of the shares of what is read
    from storage; for a cache of a quarter of all experts."""
    if not 0 <= part < 1:
        raise UsageError("bad option `--spare-reads`", f"expected 0 to below 1, got {part:g}")
    if not part:
        return scores
    reads = expected_reads(profile, index, index.expert_bytes // 4)
    return {
        layer: values / max(values.sum(), 1e-300)
        - part * reads[layer] / max(reads[layer].sum(), 1e-300)
        for layer, values in scores.items()
    }
