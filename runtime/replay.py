"""What a pool would have read: a recorded routing through policies, bounds and predictors. Floor 1.

The pool is one for all layers, accounted in bytes, cold at the first step, and takes what is
demanded as the expert cache does: the records of one layer of one token are held together, others
go in the policy's order until the absent ones fit. Memory is not cut into extents here, so nothing
is lost between records of different sizes. Of a prompt the policies are told what it demanded; it
brings nothing into the pool.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .policy import POLICIES, Fifo
from .policy_forecast import Forecast
from .policy_guard import Guard
from .policy_s3fifo import S3Fifo
from .trace import DECODE, Trace

BELADY = "belady"
REPLAYED = (*POLICIES, "s3-fifo", BELADY)
_NEVER = 1 << 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """Demand of the replayed steps on a pool of `capacity_bytes`."""

    policy: str
    capacity_bytes: int
    hits: int
    misses: int
    bytes_read: int
    num_steps: int

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_read / max(1, self.num_steps)


class _Chunk(NamedTuple):
    """What the tokens of a prompt demand at one place."""

    place: int
    routes: NDArray[np.int64]  # [num_prompt, K]: experts of the place, -1: none
    keys: NDArray[np.int64]  # [n], each once
    counts: NDArray[np.int64]  # [n]: how many tokens want each


class Demand:
    """The demand of a trace in order: the decoded steps, or all of them where none is decoded.

    `prompt`: by place, of the `num_prompt` steps before them.
    """

    def __init__(self, trace: Trace) -> None:
        chosen = trace.phase == DECODE
        self.is_prefill = not chosen.any()
        self.num_prompt = 0 if self.is_prefill else int(chosen.argmax())
        keys = trace.keys()
        prompt = keys[: self.num_prompt]
        keys = keys[slice(None) if self.is_prefill else chosen]
        keys.sort(axis=2)
        again = np.zeros(keys.shape, dtype=np.bool_)
        again[:, :, 1:] = keys[:, :, 1:] == keys[:, :, :-1]
        wanted = (keys >= 0) & ~again
        self.num_steps, self.num_places = keys.shape[:2]
        self.steps: list[tuple[int, int, NDArray[np.int64]]] = [
            (step, place, keys[step, place, wanted[step, place]])
            for step, place in np.argwhere(wanted.any(axis=2)).tolist()
        ]
        self.sizes = trace.bytes_of_key
        self.place_of_key = trace.place_of_key
        self.num_demands = int(wanted.sum())
        self.prompt: list[_Chunk] = []
        first = np.searchsorted(self.place_of_key, np.arange(self.num_places))
        for place in range(self.num_places):
            rows = np.sort(prompt[:, place], axis=1)
            rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
            named, counts = np.unique(rows, return_counts=True)
            if (named >= 0).any():
                routes = np.where(rows >= 0, rows - first[place], -1)
                self.prompt.append(_Chunk(place, routes, named[named >= 0], counts[named >= 0]))
        self.floor_bytes = max(int(self.sizes[keys].sum()) for _, _, keys in self.steps)

    def outcome(self, policy: str, capacity: int, hits: int, bytes_read: int) -> Outcome:
        return Outcome(policy, capacity, hits, self.num_demands - hits, bytes_read, self.num_steps)


def replay(demand: Demand, policy: str, capacities: Sequence[int]) -> list[Outcome]:
    """One outcome for each capacity in bytes. Raises UsageError for an unknown policy."""
    if policy == BELADY:
        return [_belady(demand, capacity) for capacity in capacities]
    if policy == "s3-fifo":
        kind = S3Fifo
    elif policy in POLICIES:
        kind = POLICIES[policy]
    else:
        raise UsageError(
            f"unknown eviction policy `{policy}`", f"expected one of {', '.join(REPLAYED)}"
        )
    pools = [_Pool(demand, capacity) for capacity in capacities]
    # What a policy knows of demand is the same for every pool, unless it looks at the pool.
    looks_at_pool = kind in (Fifo, S3Fifo)
    policies = [
        kind(demand.place_of_key, demand.num_places)
        for _ in range(len(pools) if looks_at_pool else 1)
    ]
    if kind is Forecast:
        for pool in pools:
            pool.guard = Guard(demand.sizes)
            pool.guard.set_share(pool.share)
        policies[0].guard = None
    if not looks_at_pool:
        for place, routes, keys, counts in demand.prompt:
            policies[0].route(place, routes, -1)
            policies[0].touch(keys, -1, demand.num_prompt, counts)
    for step, place, keys in demand.steps:
        for i, pool in enumerate(pools):
            pool.demand(place, keys, policies[i if looks_at_pool else 0])
        for each in policies:
            each.touch(keys, step)
    return [demand.outcome(policy, pool.capacity, pool.hits, pool.bytes_read) for pool in pools]


class _Pool:
    def __init__(self, demand: Demand, capacity: int) -> None:
        self.capacity, self.free = capacity, capacity
        self.hits = self.bytes_read = 0
        self._sizes, self._smallest = demand.sizes, int(demand.sizes.min())
        self.share = min(1.0, capacity / int(demand.sizes.sum()))
        self.guard: Guard | None = None
        self._is_resident = np.zeros(len(demand.sizes), dtype=np.bool_)

    def demand(self, place: int, keys: NDArray[np.int64], policy: object) -> None:
        is_resident = self._is_resident
        is_hit = is_resident[keys]
        num_hits = int(np.count_nonzero(is_hit))
        self.hits += num_hits
        if num_hits < len(keys):
            missing = keys[~is_hit]
            needed = int(self._sizes[missing].sum())
            self.bytes_read += needed
            if self.guard is not None:
                self.guard.expect(keys)
            if needed > self.free:
                held = keys[is_hit]
                is_resident[held] = False
                self._evict(place, needed - self.free, policy)
                is_resident[held] = True
            if needed > self.free:  # a pool that does not hold one layer's demand
                missing = missing[np.cumsum(self._sizes[missing]) <= self.free]
                needed = int(self._sizes[missing].sum())
            is_resident[missing] = True
            self.free -= needed
            for key in missing.tolist():
                (self.guard or policy).insert(key)
        if self.guard is not None:
            self.guard.touch(keys)

    def _evict(self, place: int, num_bytes: int, policy: object) -> None:
        if isinstance(policy, S3Fifo):
            for key in policy.victims(place, ~self._is_resident):
                num_bytes -= self._drop(key, policy)
                if num_bytes <= 0:
                    return
            return
        keys, scores = self._is_resident.nonzero()[0], policy.scores(place)
        most = -(-num_bytes // self._smallest)
        order = _lowest(keys, scores, policy.last_use, most)
        outside: list[int] | None = None  # of the guard's shadow, which evicting leaves as it is
        while num_bytes > 0 and order:
            key = order[0]
            if self.guard is not None and not self.guard.is_free:
                if outside is None:
                    keys = keys[~self.guard.in_shadow[keys] & self._is_resident[keys]]
                    outside = _lowest(keys, scores, policy.last_use, most)
                key = outside[0] if outside else key
            for each in (order, outside or ()):
                if key in each:
                    each.remove(key)
            num_bytes -= self._drop(key, policy)

    def _drop(self, key: int, policy: object) -> int:
        self._is_resident[key] = False
        self.free += int(self._sizes[key])
        (self.guard or policy).remove(key)
        return int(self._sizes[key])


def _lowest(
    keys: NDArray[np.int64], scores: NDArray[np.float64], last_use: NDArray[np.int64], most: int
) -> list[int]:
    """The `most` of `keys` to evict first: by score, then by last use; `scores` are of all keys."""
    own = scores[keys]
    if most < len(keys):
        is_low = own <= np.partition(own, most - 1)[most - 1]
        keys, own = keys[is_low], own[is_low]
    return keys[np.lexsort((last_use[keys], own))][:most].tolist()


def _belady(demand: Demand, capacity: int) -> Outcome:
    """What is needed furthest in the future goes: the best there is for records of one size."""
    next_use: dict[int, int] = {}
    following: list[list[int]] = []
    for time in range(len(demand.steps) - 1, -1, -1):
        keys = demand.steps[time][2].tolist()
        following.append([next_use.get(key, _NEVER) for key in keys])
        next_use.update(dict.fromkeys(keys, time))
    following.reverse()
    sizes = demand.sizes.tolist()
    resident: dict[int, int] = {}  # key -> its next use
    furthest: list[tuple[int, int]] = []
    free, hits, bytes_read = capacity, 0, 0
    for (_, _, row), uses in zip(demand.steps, following, strict=True):
        keys = row.tolist()
        missing = [key for key in keys if key not in resident]
        hits += len(keys) - len(missing)
        needed = sum(sizes[key] for key in missing)
        bytes_read += needed
        for key in keys:
            if key in resident:
                resident[key] = -1  # held: what the heap says of it is no longer true
        while needed > free and furthest:
            time, key = heapq.heappop(furthest)
            if resident.get(key) == -time:
                del resident[key]
                free += sizes[key]
        for key, use in zip(keys, uses, strict=True):
            if key not in resident:
                if sizes[key] > free:
                    continue
                free -= sizes[key]
            resident[key] = use
            heapq.heappush(furthest, (-use, key))
    return demand.outcome(BELADY, capacity, hits, bytes_read)


def recall(demand: Demand) -> dict[str, NDArray[np.float64]]:
    """Share of each place's demand [P] that a predictor names, naming as many as there are.

    `previous`: the last token's; `popular`: the most used so far; `forecast`: the likeliest by the
    default policy; `oracle` names them all. NaN where nothing was demanded.
    """
    policy = Forecast(demand.place_of_key, demand.num_places)
    first = np.searchsorted(demand.place_of_key, np.arange(demand.num_places))
    counts = np.zeros(len(demand.place_of_key))
    last: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * demand.num_places
    named = {name: np.zeros(demand.num_places) for name in ("previous", "popular", "forecast")}
    total = np.zeros(demand.num_places)
    for step, place, keys in demand.steps:
        total[place] += len(keys)
        is_wanted = np.zeros(len(counts), dtype=np.bool_)
        is_wanted[keys] = True
        named["previous"][place] += is_wanted[last[place]].sum()
        if len(last[place]):
            likely = policy.probabilities(place)
            uses = counts[first[place] : first[place] + len(likely)]
            for name, scores in (("popular", uses), ("forecast", likely)):
                best = np.argsort(-scores, kind="stable")[: len(keys)]
                named[name][place] += is_wanted[best + first[place]].sum()
        policy.touch(keys, step)
        counts[keys] += 1
        last[place] = keys
    named["oracle"] = total
    with np.errstate(invalid="ignore"):
        return {name: found / total for name, found in named.items()}
