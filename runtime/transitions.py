"""EdgeMoE's statistical tables: which experts the next MoE layer will want. Floor 0.

Order 2 (paper 1.4): the choices of the two MoE layers that ran before -> how often each expert of
the next one followed. Joint keys do not scale beyond a few experts, so every estimate leans on a
lower order: P2 = (count + W * P1) / (total + W) for a state seen `total` times; P1, the mean over
the K active experts a of P(i | a) = (pair count + W * P0) / (seen + W); P0 the popularity. An
unseen state or expert thus falls back by itself, and W says after how many sightings the data
outweighs the order below.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError

MAX_PATHS = 1 << 16  # entries of one layer's order-2 table; see runtime/profile.py
BACK_OFF = 4.0  # W; from 1 to 16 held-out recall moves by less than .002

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def path_keys(before: NDArray[np.integer], now: NDArray[np.integer]) -> NDArray[np.uint64]:
    """One u64 per row of the choices of two layers, `before` [T, K] and `now` [T, K'], each row
    ascending: h = 0, then for every id of `before`, then of `now`: h = (h ^ (id + 1)) * GOLDEN mod
    2^64, h ^= h >> 32. Different states share a key with probability 2^-64."""
    keys = np.zeros(len(before), dtype=np.uint64)
    for column in (*np.asarray(before).T, *np.asarray(now).T):
        keys = (keys ^ (column.astype(np.uint64) + np.uint64(1))) * _GOLDEN
        keys ^= keys >> np.uint64(32)
    return keys


def count_pairs(
    first: NDArray[np.integer], second: NDArray[np.integer], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """How often each pair of choices stands in the same row: first [T, K], second [T, K'] -> i64
    `shape` [E, E']."""
    cells = first.astype(np.int64)[:, :, None] * shape[1] + second[:, None, :]
    return np.bincount(cells.reshape(-1), minlength=shape[0] * shape[1]).reshape(shape)


@dataclass(slots=True)
class Paths:
    """Order-2 counts of one layer, [N] each, sorted by (key, expert), no entry twice."""

    key: NDArray[np.uint64]
    expert: NDArray[np.int16]
    count: NDArray[np.int32]

    @classmethod
    def of(cls, keys: NDArray[np.uint64], following: NDArray[np.integer]) -> "Paths | None":
        """Counts of keys [T] followed by choices [T, K]; None where there are too many."""
        repeated = np.repeat(keys, following.shape[1])
        experts = np.ascontiguousarray(following).reshape(-1).astype(np.int16)
        return _joined(repeated, experts, np.ones(len(repeated), dtype=np.int32))

    def __add__(self, other: "Paths") -> "Paths | None":
        """The counts of both; None where they are too many, as they would have been at once."""
        return _joined(
            np.concatenate((self.key, other.key)),
            np.concatenate((self.expert, other.expert)),
            np.concatenate((self.count, other.count)),
        )

    def validate(self, where: str, num_experts: int) -> None:
        """Raises FormatError unless arrays, order and ranges are as described."""
        is_sorted = (
            self.key.ndim == 1
            and self.key.shape == self.expert.shape == self.count.shape
            and self.key.dtype == np.uint64
            and self.expert.dtype.kind == self.count.dtype.kind == "i"
        )
        if is_sorted and len(self.key):
            step = self.key[1:] > self.key[:-1]
            step |= (self.key[1:] == self.key[:-1]) & (self.expert[1:] > self.expert[:-1])
            is_sorted = bool(step.all()) and 0 <= self.expert.min() <= self.expert.max()
            is_sorted = is_sorted and self.expert.max() < num_experts and self.count.min() > 0
        if not is_sorted:
            raise FormatError(f"{where}: the table of paths is damaged")


def _joined(
    keys: NDArray[np.uint64], experts: NDArray[np.int16], counts: NDArray[np.int32]
) -> Paths | None:
    if not len(keys):
        return Paths(keys, experts, counts)
    order = np.lexsort((experts, keys))
    keys, experts = keys[order], experts[order]
    is_new = np.ones(len(keys), dtype=np.bool_)
    is_new[1:] = (keys[1:] != keys[:-1]) | (experts[1:] != experts[:-1])
    starts = is_new.nonzero()[0]
    if len(starts) > MAX_PATHS:
        return None
    sums = np.add.reduceat(counts[order], starts, dtype=np.int32)
    return Paths(keys[starts], experts[starts], sums)


@dataclass(frozen=True, slots=True)
class PlaceTables:
    """What predicts one MoE layer. Probabilities of its E' experts add up to about K.

    The order-2 table in sorted rows: state `path_key[r]` was seen `path_total[r]` times, followed
    `path_count[j]` times by expert `path_expert[j]` for j in path_begin[r] .. path_begin[r + 1].
    """

    popularity: NDArray[np.float32]  # [E']
    pairwise: NDArray[np.float32]  # [E, E'], rows already backed off
    path_key: NDArray[np.uint64]  # [R], ascending
    path_total: NDArray[np.float32]  # [R]
    path_begin: NDArray[np.int64]  # [R + 1]
    path_expert: NDArray[np.int32]  # [N]
    path_count: NDArray[np.float32]  # [N]

    def scores(
        self, active: NDArray[np.integer], before: NDArray[np.integer] | None = None
    ) -> NDArray[np.float32]:
        """Probability of each expert, [E'], after the choices `active` [K] of the layer before and
        `before` [K] of the one before that, ascending; None: not known."""
        scores = self.pairwise[active].mean(axis=0, dtype=np.float32)
        if before is None or not len(self.path_key):
            return scores
        key = path_keys(before[None], active[None])[0]
        row = int(np.searchsorted(self.path_key, key))
        if row == len(self.path_key) or self.path_key[row] != key:
            return scores
        part = slice(int(self.path_begin[row]), int(self.path_begin[row + 1]))
        scores *= np.float32(BACK_OFF)
        scores[self.path_expert[part]] += self.path_count[part]
        scores /= self.path_total[row] + np.float32(BACK_OFF)
        return scores


def make_tables(
    popularity: NDArray[np.float64],
    top_k: int,
    next_count: NDArray[np.int64],
    paths: Paths | None,
) -> PlaceTables:
    """Tables from counts: `next_count` [E, E'] of the layer before, `paths` into this one."""
    seen = next_count.sum(axis=1, keepdims=True) / top_k
    pairwise = (next_count + BACK_OFF * popularity) / (seen + BACK_OFF)
    if paths is None:
        paths = Paths(*(np.empty(0, dtype=t) for t in (np.uint64, np.int16, np.int32)))
    keys, starts = np.unique(paths.key, return_index=True)
    begins = np.append(starts, len(paths.key)).astype(np.int64)
    totals = np.add.reduceat(paths.count, starts) / top_k if len(starts) else np.empty(0)
    return PlaceTables(
        popularity.astype(np.float32),
        pairwise.astype(np.float32),
        keys,
        totals.astype(np.float32),
        begins,
        paths.expert.astype(np.int32),
        paths.count.astype(np.float32),
    )
