"""The bound of the default policy against plain LRU: whatever is demanded, and in every pool."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgemoe.runtime.policy import POLICIES
from edgemoe.runtime.policy_forecast import Forecast
from edgemoe.runtime.policy_guard import Guard
from edgemoe.runtime.replay import Demand, replay
from edgemoe.runtime.trace import Trace


def trace_of(experts: np.ndarray, num_experts: int) -> Trace:
    """[S, P, K]"""
    steps, places, _ = experts.shape
    return Trace(
        experts=experts.astype(np.int32),
        weights=None,
        phase=np.ones(steps, dtype=np.int8),
        num_experts=np.full(places, num_experts),
        expert_bytes=np.full(places, 4096),
    )


def losses(trace: Trace, capacities: list[int]) -> list[tuple[int, float]]:
    """For each pool: hits that LRU has and the default policy has not, and how many it may lose."""
    demand = Demand(trace)
    ours, lru = (replay(demand, n, [4096 * c for c in capacities]) for n in ("forecast", "lru"))
    evictions = [max(0, each.misses - c) for each, c in zip(lru, capacities, strict=True)]
    return [
        (b.hits - a.hits, min(56, n / 2) + n / 96)
        for a, b, n in zip(ours, lru, evictions, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), places=st.integers(1, 4), capacity=st.integers(3, 20))
@example(seed=0, places=1, capacity=4)
def test_no_demand_makes_it_lose_more_than_its_allowance(seed, places, capacity):
    """Working sets that change at random moments, with holes where less than top-k is active."""
    rng = np.random.default_rng(seed)
    experts = np.empty((80, places, 3), dtype=np.int64)
    for place in range(places):
        favourites = rng.permutation(8)
        for step in range(80):
            if rng.random() < 0.1:
                favourites = rng.permutation(8)
            experts[step, place] = favourites[rng.permutation(4)[:3]]
    experts[rng.random(experts.shape) < 0.2] = -1
    experts[0, 0, 0] = 0
    for lost, allowed in losses(trace_of(experts, 8), [capacity]):
        assert lost <= allowed


def test_without_it_the_forecast_alone_loses_more(monkeypatch):
    """A habit of 256 tokens that ends: what is believed of it holds what LRU gives up at once."""
    rng = np.random.default_rng(1)
    habit = np.stack([[rng.permutation(12)[:4] for _ in range(4)] for _ in range(256)])
    loop = 12 + (4 * np.arange(320)[:, None, None] + np.arange(4)) % 15
    trace = trace_of(np.concatenate([habit, np.repeat(loop, 4, axis=1)]), 32)
    bound = losses(trace, [70])[0]
    assert 0 < bound[0] <= bound[1]
    monkeypatch.setattr(Guard, "is_free", property(lambda self: True))
    lost, allowed = losses(trace, [70])[0]
    assert lost > 2 * allowed


def test_only_what_lru_would_not_have_goes_while_nothing_is_earned():
    guard = Guard([4096] * 8)
    guard.set_share(0.5)  # 4 records
    for key in (0, 1, 2, 3):
        guard.expect(np.array([key]))
        guard.insert(key)
        guard.touch(np.array([key]))
    assert not guard.is_free and guard.in_shadow.tolist() == [True] * 4 + [False] * 4
    guard.expect(np.array([4]))  # LRU lets 0 go
    assert guard.in_shadow.nonzero()[0].tolist() == [1, 2, 3, 4]
    guard.remove(3)  # so that 3 can become a hit of LRU that we miss
    guard.insert(4)
    guard.touch(np.array([4]))
    assert not guard.is_free
    guard.expect(np.array([0]))  # kept when LRU let it go, and wanted next; LRU lets 1 go
    guard.touch(np.array([0]))
    assert guard.is_free  # one is earned, for 3; the next is allowed after two evictions of LRU


def test_a_warm_start_is_lent_and_a_smaller_pool_forgets_the_oldest():
    guard = Guard([4096] * 8)
    guard.set_share(0.5)
    for key in (5, 6):
        guard.insert(key)
    guard.touch(np.array([1]))
    assert guard.in_shadow.nonzero()[0].tolist() == [1, 5, 6]
    guard.set_share(0.25)
    assert guard.in_shadow.nonzero()[0].tolist() == [1, 5]


@pytest.mark.parametrize("name", POLICIES)
def test_only_the_forecast_is_guarded_and_a_seed_is_no_demand(name):
    policy = POLICIES[name]([0] * 4, 1)
    policy.set_share(0.5)
    policy.seed(np.arange(4), 0, np.ones(4))
    assert (policy.guard is not None) == isinstance(policy, Forecast)
    if policy.guard is not None:
        assert not policy.guard.in_shadow.any()
