"""Eviction policies, against their definitions, against each other, and against Belady."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import Trace, belady_hits, replay_hits, skewed_trace

from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.policy import NO_VICTIM, POLICIES, CycleAware, Fifo, Lfu, Lru, make_policy
from edgemoe.runtime.policy_forecast import Forecast, exp2, log2

L, E, K = 8, 16, 2  # one token's cycle: 16 of 128 records


def places(num_layers: int, num_experts: int) -> list[int]:
    return [layer for layer in range(num_layers) for _ in range(num_experts)]


def drain(policy, layer: int, num_keys: int) -> list[int]:
    """All keys in the order of eviction."""
    blocked = np.zeros(num_keys, dtype=np.bool_)
    order = []
    while (key := policy.victim(layer, blocked)) != NO_VICTIM:
        order.append(key)
        blocked[key] = True
    return order


def test_what_has_just_run_goes_first_and_what_runs_next_stays():
    policy = CycleAware(places(6, 1), 6)
    policy.touch(np.arange(6), 0)
    assert drain(policy, 2, 6) == [2, 1, 0, 5, 4, 3]
    assert drain(policy, 5, 6) == [5, 4, 3, 2, 1, 0]


def test_frequency_weighs_against_distance():
    policy = CycleAware(places(4, 2), 4)
    policy.touch(np.arange(8), 0)
    for _ in range(2):
        policy.touch(np.array([1]), 0)  # 3 uses, layer 0 runs: 3/4; key 6 of layer 3: 1/3
    assert drain(policy, 0, 8) == [0, 6, 7, 4, 5, 1, 2, 3]


def test_the_frequency_halves_every_half_life():
    policy = CycleAware(places(1, 3), 1, half_life=8)
    for _ in range(2):
        policy.touch(np.array([0]), 0)
    policy.touch(np.array([1]), 7)  # weighs 2 ** (7 / 8) < 2
    policy.touch(np.array([2]), 9)  # weighs 2 ** (9 / 8) > 2
    assert drain(policy, 0, 3) == [1, 0, 2]


def test_equal_scores_go_by_recency():
    policy = CycleAware(places(1, 3), 1)
    for key in (1, 2, 0):
        policy.touch(np.array([key]), 5)
    assert drain(policy, 0, 3) == [1, 2, 0]


def test_a_long_session_neither_overflows_nor_forgets_the_order():
    policy = CycleAware(places(2, 4), 2, half_life=4)
    with np.errstate(all="raise", under="ignore"):
        for step in range(0, 40_000, 100):
            policy.touch(np.array([step // 100 % 8]), step)
    assert drain(policy, 0, 8) == list(range(8))


@settings(deadline=None)
@given(num_tokens=st.integers(1, 64), start=st.integers(0, 100))
def test_a_chunk_weighs_what_its_tokens_weigh_one_by_one(num_tokens, start):
    chunk, single = (CycleAware(places(1, 2), 1) for _ in range(2))
    end = start + num_tokens - 1
    chunk.touch(np.array([0]), end, num_tokens, np.array([num_tokens]))
    for step in range(start, end + 1):
        single.touch(np.array([0]), step)
    assert chunk._value[0] == pytest.approx(single._value[0])


def test_lru_fifo_lfu():
    lru, fifo, lfu = (cls(places(1, 4), 1) for cls in (Lru, Fifo, Lfu))
    for policy in (lru, fifo, lfu):
        for step, key in enumerate((2, 0, 3, 1, 2, 2, 0)):
            policy.touch(np.array([key]), step)
            if step < 4:
                policy.insert(key)
    assert drain(lru, 0, 4) == [3, 1, 2, 0]
    assert drain(fifo, 0, 4) == [2, 0, 3, 1]
    assert drain(lfu, 0, 4) == [3, 1, 0, 2]


def test_lfu_counts_tokens():
    policy = Lfu(places(1, 2), 1)
    policy.touch(np.array([0, 1]), 9, 10, np.array([3, 10]))
    policy.touch(np.array([0]), 10)
    assert drain(policy, 0, 2) == [0, 1]


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_victim_is_never_blocked(name, data):
    policy = make_policy(name, places(3, 4), 3)
    for step in range(data.draw(st.integers(0, 10))):
        keys = data.draw(st.sets(st.integers(0, 11), min_size=1))
        policy.touch(np.array(sorted(keys)), step)
    blocked = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))
    key = policy.victim(data.draw(st.integers(0, 2)), blocked)
    assert (key == NO_VICTIM) == blocked.all()
    assert key == NO_VICTIM or not blocked[key]


def test_an_unknown_policy_is_named():
    with pytest.raises(UsageError, match="`arc`.*cycle, fifo, forecast, lfu, lru"):
        make_policy("arc", [0], 1)


def rates(trace: Trace, capacity: int, num_layers: int, num_experts: int) -> dict[str, float]:
    demand = sum(len(keys) for _, keys in trace)
    found = {"belady": belady_hits(trace, capacity) / demand}
    for name in POLICIES:
        policy = make_policy(name, places(num_layers, num_experts), num_layers)
        hits = replay_hits(trace, capacity, policy, num_layers * num_experts)
        found[name] = hits / demand
    return found


@pytest.mark.parametrize("capacity", [8, 12])
def test_below_one_cycle_the_cycle_aware_policy_beats_lru(capacity):
    found = rates(skewed_trace(300, L, E, K), capacity, L, E)
    assert found["lru"] == 0
    assert found["cycle"] > 0.5 * found["belady"] > 0
    assert found["cycle"] >= max(found[name] for name in ("lru", "fifo", "lfu"))


@pytest.mark.parametrize("capacity", [16, 32, 64])
def test_above_one_cycle_it_does_not_lose(capacity):
    found = rates(skewed_trace(300, L, E, K), capacity, L, E)
    assert found["belady"] >= found["cycle"] >= max(found["lru"], found["fifo"])


@settings(max_examples=30, deadline=None)
@given(
    trace=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=2), min_size=1, max_size=7),
    capacity=st.integers(2, 4),
)
def test_belady_is_the_best_of_all_evictions(trace, capacity):
    def best(position: int, resident: frozenset[int]) -> int:
        if position == len(trace):
            return 0
        keys = frozenset(trace[position])
        union = resident | keys
        room = [union]
        while len(next(iter(room))) > capacity:
            room = {rest - {key} for rest in room for key in rest - keys}
        return len(keys & resident) + max(best(position + 1, rest) for rest in room)

    groups = [(0, sorted(keys)) for keys in trace]
    assert belady_hits(groups, capacity) == best(0, frozenset())


# ---- forecast -----------------------------------------------------------------------------------


def follow(policy, tokens: int, choose, step: int = 0) -> None:
    for token in range(step, step + tokens):
        for layer in range(2):
            policy.touch(np.array(sorted(choose(token, layer))), token)


def test_logarithm_and_exponential_are_inverse_and_exact_at_powers_of_two():
    x = np.array([2.0**-20, 0.5, 1.0, 3.0, 1e6], dtype=np.float32)
    assert log2(x[[0, 1, 2]]).tolist() == [-20, -1, 0]
    assert exp2(log2(x)) == pytest.approx(x, rel=1e-5)
    dense = np.linspace(0.01, 100, 999, dtype=np.float32)
    assert (np.diff(log2(dense)) > 0).all()
    assert abs(log2(dense) - np.log2(dense)).max() < 0.09


def test_it_learns_whether_recency_or_habit_tells():
    # Layer 0 uses 0 and 1 in turns; layer 1 uses 8 three times out of four.
    habit = Forecast(places(2, 8), 2)
    follow(habit, 82, lambda t, layer: {8 if t % 4 else 9} if layer else {t % 2})
    likely = habit.probabilities(1)
    assert likely[0] > 0.5 > likely[2:].max()
    assert set(np.argsort(-habit.probabilities(0))[:2].tolist()) == {0, 1}


def test_it_remembers_what_followed_a_token_like_this_one():
    # A round of seven tokens: neither recency nor frequency tells what is next, the memory does.
    policy = Forecast(places(2, 7), 2)
    follow(policy, 70, lambda t, layer: {7 * layer + (3 * t + layer) % 7})
    for layer in range(2):
        assert int(policy.probabilities(layer).argmax()) == (3 * 70 + layer) % 7


def test_what_comes_soon_is_worth_more_than_what_comes_late():
    # Rounds of 13: the memory knows one, two, .. eight turns ahead; a fifth goes with each cycle.
    policy = Forecast(places(2, 13), 2)
    follow(policy, 130, lambda t, layer: {13 * layer + t % 13})
    scores = policy.scores(0)[13:]
    assert scores[0] == pytest.approx(0.8**0.5, rel=0.05)  # half a cycle from layer 0
    assert scores[0] > 1.2 * scores[1:4].max()
    assert scores[1:4].min() > 1.2 * scores[4:8].max() and scores[4:8].min() > scores[9:].max()


def test_a_chunk_a_seed_and_a_long_pause_leave_it_sane():
    policy = Forecast(places(2, 8), 2)
    with np.errstate(all="raise", under="ignore"):
        for layer in range(2):
            policy.touch(8 * layer + np.arange(8), 511, 512, np.arange(1, 9))
        policy.touch(np.arange(16), 511, counts=np.full(16, 23.0))
        policy.touch(np.arange(2), 511, counts=np.zeros(2))
        follow(policy, 3000, lambda t, layer: {8 * layer + t % 3}, step=100_000)
        policy.touch(np.array([[0, 1], [8, 9]]), 200_000)
    scores = policy.scores(1)
    assert np.isfinite(scores).all() and (scores > 0).all()
    assert scores[:3].min() > scores[3:8].max()
