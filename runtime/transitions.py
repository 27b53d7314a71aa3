"""Statistical tables: which experts a MoE layer will want, before its router speaks. Floor 0.

EdgeMoE's order 2 (paper 1.4): the choices of the two MoE layers that ran before, as one state ->
how often each expert of the next layer followed. Beside it the same by token id, which is known
before the first layer runs. Each estimate leans on a lower order by W = BACK_OFF sightings, so that
what was never seen falls back by itself:

    P = (count + W * P_lower) / (seen + W)
    state -> pairs -> popularity        token id -> popularity

where pairs are the mean over the K active experts a of P(i | a). Where both are known, the estimate
is the mean of the two. Recall at K on held-out text of the demo model (32 experts, K 4; 92,000
tokens seen, 90,000 scored): popularity .26, pairs .37, order 2 .54, token id .59, both .66; one
chain state -> token id -> pairs reached .65, the product of both .67. Between W = 1 and 4 lies
.002, W = 16 loses .03; states seen only once are worth .04.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError

BACK_OFF = 2.0
MAX_ENTRIES = 1 << 20  # of one table of one layer: 14 MiB
ALL_ENTRIES = 1 << 22  # of one kind of table, all layers together: 56 MiB

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def path_keys(before: NDArray[np.integer], now: NDArray[np.integer]) -> NDArray[np.uint64]:
    """One u64 per row of the choices of two layers, `before` [T, K] and `now` [T, K'], each row
    ascending, then -1: h = 0, then for every id of `before`, then of `now`: h = (h ^ (id + 1)) *
    GOLDEN mod 2^64, h ^= h >> 32. Two states share a key with probability 2^-64."""
    keys = np.zeros(len(before), dtype=np.uint64)
    for column in (*np.asarray(before).T, *np.asarray(now).T):
        mixed = (keys ^ (column.astype(np.uint64) + np.uint64(1))) * _GOLDEN
        mixed ^= mixed >> np.uint64(32)
        keys = np.where(column >= 0, mixed, keys)
    return keys


def count_pairs(
    first: NDArray[np.integer], second: NDArray[np.integer], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """How often each pair of choices stands in the same row: first [T, K], second [T, K'], -1:
    none -> i64 `shape` [E, E']."""
    cells = first.astype(np.int64)[:, :, None] * shape[1] + second[:, None, :]
    cells = cells[(first >= 0)[:, :, None] & (second >= 0)[:, None, :]]
    return np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)


def following_choices(routes: NDArray[np.integer], place: int, steps: int) -> NDArray[np.integer]:
    """Choices `steps` places after `place`, which may be in the next token: [T or T - 1, K]."""
    wraps, at = divmod(place + steps, routes.shape[1])
    return routes[wraps:, at]


@dataclass(slots=True)
class StateCounts:
    """How often a state was followed by an expert: [N] each, sorted by (key, expert), no entry
    twice. Of more than `limit` entries, the states seen least are forgotten; until then the counts
    of two texts add up exactly."""

    key: NDArray[np.uint64]
    expert: NDArray[np.int16]
    count: NDArray[np.int32]
    limit: int = MAX_ENTRIES

    @classmethod
    def empty(cls, num_layers: int = 1) -> "StateCounts":
        """Of one of so many layers, which share ALL_ENTRIES."""
        none = (np.empty(0, dtype=t) for t in (np.uint64, np.int16, np.int32))
        return cls(*none, limit=min(MAX_ENTRIES, ALL_ENTRIES // num_layers))

    def add(self, keys: NDArray[np.uint64], following: NDArray[np.integer]) -> "StateCounts":
        """These, and states keys [T] followed by the choices [T, K], -1: none."""
        experts = np.ascontiguousarray(following).reshape(-1).astype(np.int16)
        is_one = experts >= 0
        keys = np.repeat(keys, following.shape[1])[is_one]
        count = np.ones(len(keys), dtype=np.int32)
        return self + StateCounts(keys, experts[is_one], count)

    def __add__(self, other: "StateCounts") -> "StateCounts":
        keys = np.concatenate((self.key, other.key))
        experts = np.concatenate((self.expert, other.expert))
        if not len(keys):
            return self
        order = np.lexsort((experts, keys))
        keys, experts = keys[order], experts[order]
        is_new = np.ones(len(keys), dtype=np.bool_)
        is_new[1:] = (keys[1:] != keys[:-1]) | (experts[1:] != experts[:-1])
        starts = is_new.nonzero()[0]
        counts = np.concatenate((self.count, other.count))[order]
        sums = np.add.reduceat(counts, starts, dtype=np.int32)
        return StateCounts(keys[starts], experts[starts], sums, self.limit).most_seen(self.limit)

    def most_seen(self, num_entries: int) -> "StateCounts":
        """At most so many entries: of the states seen most, all or none of those seen as often."""
        if len(self.key) <= num_entries:
            return self
        starts = np.unique(self.key, return_index=True)[1]
        seen = np.add.reduceat(self.count, starts)
        sizes = np.diff(np.append(starts, len(self.key)))
        entries = np.bincount(seen, weights=sizes).astype(np.int64)[::-1].cumsum()[::-1]
        least = int(
            np.searchsorted(-entries, -num_entries)
        )  # the first that fits, or one above all
        kept = np.repeat(seen >= least, sizes)
        return StateCounts(self.key[kept], self.expert[kept], self.count[kept], self.limit)

    def validate(self, where: str, num_experts: int) -> None:
        """Raises FormatError unless arrays, order and ranges are as described."""
        is_good = (
            self.key.ndim == 1
            and self.key.shape == self.expert.shape == self.count.shape
            and self.key.dtype == np.uint64
            and self.expert.dtype.kind == self.count.dtype.kind == "i"
        )
        if is_good and len(self.key):
            step = self.key[1:] > self.key[:-1]
            step |= (self.key[1:] == self.key[:-1]) & (self.expert[1:] > self.expert[:-1])
            is_good = bool(step.all()) and 0 <= self.expert.min() <= self.expert.max()
            is_good = is_good and self.expert.max() < num_experts and self.count.min() > 0
        if not is_good:
            raise FormatError(f"{where}: a table of states is damaged")


@dataclass(frozen=True, slots=True)
class StateTable:
    """Counts by state in sorted rows: state `key[r]` was seen `total[r]` times, followed `count[j]`
    times by expert `expert[j]` for j in begin[r] .. begin[r + 1]."""

    key: NDArray[np.uint64]  # [R], ascending
    total: NDArray[np.float32]  # [R]
    begin: NDArray[np.int64]  # [R + 1]
    expert: NDArray[np.int32]  # [N]
    count: NDArray[np.float32]  # [N]

    @classmethod
    def of(cls, counts: StateCounts, top_k: int) -> "StateTable":
        """`top_k`: choices that follow one sighting."""
        keys, starts = np.unique(counts.key, return_index=True)
        totals = np.add.reduceat(counts.count, starts) / top_k if len(starts) else np.empty(0)
        return cls(
            keys,
            totals.astype(np.float32),
            np.append(starts, len(counts.key)).astype(np.int64),
            counts.expert.astype(np.int32),
            counts.count.astype(np.float32),
        )

    def refine(self, scores: NDArray[np.float32], keys: NDArray[np.uint64]) -> None:
        """Lean the scores [T, E] of the states keys [T] that are known on what was counted."""
        if not len(self.key):
            return
        rows = np.searchsorted(self.key, keys)
        rows[rows == len(self.key)] = 0
        for t in (self.key[rows] == keys).nonzero()[0].tolist():
            row = rows[t]
            part = slice(int(self.begin[row]), int(self.begin[row + 1]))
            scores[t] *= np.float32(BACK_OFF)
            scores[t, self.expert[part]] += self.count[part]
            scores[t] /= self.total[row] + np.float32(BACK_OFF)


@dataclass(frozen=True, slots=True)
class PlaceTables:
    """What predicts one MoE layer. Probabilities of its E' experts add up to K."""

    popularity: NDArray[np.float32]  # [E']
    pairwise: NDArray[np.float32]  # [E, E'], rows already backed off
    tokens: StateTable  # by token id
    paths: StateTable  # by `path_keys` of the two layers before

    def __getattr__(self, name: str) -> NDArray[np.generic]:
        """The core's flat names of the tables: `path_key`, `token_total` and so on."""
        table, _, part = name.partition("_")
        if table not in ("path", "token") or part not in StateTable.__slots__:
            raise AttributeError(name)
        return getattr(self.paths if table == "path" else self.tokens, part)

    def scores(
        self,
        active: NDArray[np.integer] | None,
        before: NDArray[np.integer] | None = None,
        token: int | None = None,
    ) -> NDArray[np.float32]:
        """Probability of each expert, [E'], after the choices `active` [K] of the layer before,
        `before` [K] of the one before that, ascending, then -1, and for this token id; None: not
        known."""
        return self.score_rows(
            None if active is None else active[None],
            None if before is None else before[None],
            None if token is None else np.array([token]),
        )[0]

    def score_rows(
        self,
        active: NDArray[np.integer] | None,
        before: NDArray[np.integer] | None = None,
        tokens: NDArray[np.integer] | None = None,
    ) -> NDArray[np.float32]:
        """`scores` of T tokens: active, before [T, K], tokens [T] -> [T, E']."""
        found = []
        if active is not None:
            is_one = active >= 0
            rows = np.where(is_one[:, :, None], self.pairwise[active], np.float32(0.0))
            counts = np.maximum(is_one.sum(axis=1, dtype=np.float32), 1)
            found.append(rows.sum(axis=1, dtype=np.float32) / counts[:, None])
            if before is not None:
                self.paths.refine(found[0], path_keys(before, active))
        if tokens is not None or active is None:
            found.append(np.tile(self.popularity, (1 if tokens is None else len(tokens), 1)))
            if tokens is not None:
                self.tokens.refine(found[-1], tokens.astype(np.uint64))
        return sum(found) / np.float32(len(found))

    @classmethod
    def of(
        cls,
        popularity: NDArray[np.float64],
        top_k: int,
        next_count: NDArray[np.int64],
        tokens: StateCounts,
        paths: StateCounts,
    ) -> "PlaceTables":
        """From `next_count` [E, E'] and `paths` of the layer before, and `tokens` of this one."""
        seen = next_count.sum(axis=1, keepdims=True) / top_k
        pairwise = (next_count + BACK_OFF * popularity) / (seen + BACK_OFF)
        return cls(
            popularity.astype(np.float32),
            pairwise.astype(np.float32),
            StateTable.of(tokens, top_k),
            StateTable.of(paths, top_k),
        )
