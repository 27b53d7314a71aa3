"""Replays against the oracles of replay.py, and what the default policy promises."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import belady_hits, replay_hits, skewed_trace

from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.policy import POLICIES, make_policy
from edgemoe.runtime.replay import BELADY, REPLAYED, Demand, recall, replay
from edgemoe.runtime.trace import Trace

ROOT = Path(__file__).resolve().parent.parent
TRACES = os.environ.get("EDGEMOE_TRACES")
L, E, K = 6, 16, 2


def as_trace(steps: list, num_layers: int = L, num_experts: int = E, **changes) -> Trace:
    """A `Trace` of the list that replay.py's oracles take; every layer of every token is in it."""
    width = max(len(keys) for _, keys in steps)
    experts = np.full((len(steps) // num_layers, num_layers, width), -1, dtype=np.int32)
    for number, (layer, keys) in enumerate(steps):
        row = np.array(keys) - layer * num_experts
        experts[number // num_layers, layer, : len(keys)] = row
    values = {
        "experts": experts,
        "weights": None,
        "phase": np.ones(len(experts), dtype=np.int8),
        "num_experts": np.full(num_layers, num_experts),
        "expert_bytes": np.full(num_layers, 4096),
    }
    return Trace(**values | changes)


def hit_rates(
    trace: Trace, shares: list[float], policies: tuple[str, ...] = REPLAYED
) -> dict[str, list[float]]:
    demand = Demand(trace)
    capacities = [int(share * trace.table_bytes) for share in shares]
    return {name: [each.hit_rate for each in replay(demand, name, capacities)] for name in policies}


@pytest.mark.parametrize("name", [*POLICIES, BELADY])
def test_a_replay_is_that_of_the_oracle(name):
    steps = skewed_trace(60, L, E, K)
    places = [layer for layer in range(L) for _ in range(E)]
    outcomes = replay(Demand(as_trace(steps)), name, [4096 * n for n in (2, 7, 12, 40, L * E)])
    for outcome in outcomes:
        records = outcome.capacity_bytes // 4096
        if name == BELADY:
            expected = belady_hits(steps, records)
        else:
            policy = make_policy(name, places, L)
            policy.set_share(records / (L * E))
            expected = replay_hits(steps, records, policy, L * E)
        assert outcome.hits == expected
        assert outcome.bytes_read == 4096 * outcome.misses
        assert outcome.hits + outcome.misses == 60 * L * K


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_nothing_hits_more_than_belady_where_records_are_equal(data):
    rows = st.lists(st.integers(-1, 4), min_size=3, max_size=3)
    drawn = data.draw(st.lists(st.lists(rows, min_size=2, max_size=2), min_size=1, max_size=12))
    trace = Trace(
        experts=np.array(drawn, dtype=np.int32),
        weights=None,
        phase=np.ones(len(drawn), dtype=np.int8),
        num_experts=np.array([5, 5]),
        expert_bytes=np.array([4096, 4096]),
    )
    if (trace.experts < 0).all():
        return
    rates = hit_rates(trace, [0.3, 0.5, 0.9])  # every pool holds the demand of one layer
    for name, row in rates.items():
        assert all(rate <= best for rate, best in zip(row, rates[BELADY], strict=True)), name


@pytest.mark.parametrize("name", REPLAYED)
def test_records_of_different_sizes_stay_within_the_pool(name):
    steps = skewed_trace(40, L, E, K)
    sizes = 4096 * np.random.default_rng(1).integers(1, 6, L * E)
    trace = as_trace(steps, record_bytes=sizes, expert_bytes=np.full(L, 5 * 4096))
    demand = Demand(trace)
    outcomes = replay(demand, name, [1, demand.floor_bytes, trace.table_bytes // 3, 1 << 40])
    hits = [outcome.hits for outcome in outcomes]
    assert hits == sorted(hits) and hits[0] == 0
    distinct = {key for _, keys in steps for key in keys}
    assert outcomes[-1].misses == len(distinct)
    assert outcomes[-1].bytes_read == sizes[list(distinct)].sum()


def test_a_trace_without_decoded_steps_is_replayed_whole():
    trace = as_trace(skewed_trace(10, L, E, K), phase=np.zeros(10, dtype=np.int8))
    demand = Demand(trace)
    assert demand.is_prefill and demand.num_steps == 10


def test_prefill_and_experts_named_twice_are_left_out():
    trace = as_trace(skewed_trace(10, L, E, K), phase=np.array([0] * 4 + [1] * 6, dtype=np.int8))
    trace.experts[5, 2] = 3  # twice
    trace.experts[6, 1] = -1
    demand = Demand(trace)
    assert demand.num_steps == 6 and demand.num_demands == 6 * L * K - 1 - K
    assert len(demand.steps) == 6 * L - 1


def test_a_prompt_is_known_before_the_pool_holds_anything():
    steps = skewed_trace(60, L, E, K)
    phase = np.repeat(np.array([0, 1], dtype=np.int8), [20, 40])
    demand = Demand(as_trace(steps, phase=phase))
    alone = Demand(as_trace(steps[20 * L :]))
    assert sum(chunk.counts.sum() for chunk in demand.prompt) == 20 * L * K
    assert not alone.prompt and demand.num_demands == alone.num_demands
    for name in REPLAYED:
        told, cold = (replay(each, name, [4096 * 14])[0].hits for each in (demand, alone))
        if name in ("lru", "fifo", "s3-fifo", BELADY):
            assert told == cold, name
        else:
            assert told != cold, name


def test_the_order_of_a_prompts_tokens_tells_what_follows_in_an_answer_that_quotes_it():
    rng = np.random.default_rng(5)
    passage = np.array([[rng.permutation(16)[:3] for _ in range(4)] for _ in range(48)])
    phase = np.repeat(np.array([0, 1], dtype=np.int8), 48)
    hits = []
    for prompt in (passage, passage[rng.permutation(48)]):
        trace = Trace(
            experts=np.concatenate([prompt, passage]).astype(np.int32),
            weights=None,
            phase=phase,
            num_experts=np.full(4, 16),
            expert_bytes=np.full(4, 4096),
        )
        hits.append(replay(Demand(trace), "forecast", [4096 * 24])[0].hits)
    assert hits[0] > 1.1 * hits[1]


def test_an_unknown_policy_is_named():
    with pytest.raises(UsageError, match="`arc`.*s3-fifo, belady"):
        replay(Demand(as_trace(skewed_trace(2, L, E, K))), "arc", [1 << 20])


def test_recall_of_known_predictors():
    steps = [
        (layer, [layer * E, layer * E + 1 + token]) for token in range(5) for layer in range(L)
    ]
    found = recall(Demand(as_trace(steps)))
    assert found["oracle"].tolist() == [1.0] * L
    assert found["previous"] == pytest.approx([4 / 10] * L)  # one of two, but for the first token
    assert (found["forecast"] >= found["previous"]).all()


# ---- what the default policy promises -----------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_on_a_skewed_cyclic_trace_ours_hit_as_much_as_the_plain_ones(seed):
    trace = as_trace(skewed_trace(300, 8, E, K, seed), num_layers=8)
    rates = hit_rates(trace, [0.01, 0.0625, 0.1, 0.125, 0.2, 0.35, 0.5, 0.7, 0.9])
    plain = [max(row) for row in zip(*(rates[n] for n in ("lru", "lfu", "fifo")), strict=True)]
    for number, best in enumerate(rates[BELADY]):
        slack = 0.0 if number < 7 else 0.004  # almost all is resident, and some luck decides
        for name in ("forecast", "cycle"):
            assert plain[number] - slack <= rates[name][number] <= best
        assert rates["forecast"][number] >= rates["lru"][number]


def check_promise(trace: Trace, closed: float, shares: list[float]) -> None:
    """At or above LRU everywhere; `closed` of the gap to Belady closed above one token's cycle."""
    rates = hit_rates(trace, shares, ("forecast", "lru", BELADY))
    cycle = trace.cycle_bytes / trace.table_bytes
    for share, ours, lru, best in zip(
        shares, rates["forecast"], rates["lru"], rates[BELADY], strict=True
    ):
        assert lru <= ours <= best
        if share > cycle:
            assert ours >= lru + closed * (best - lru), share


@pytest.mark.skipif(core.lib is None, reason="native core not built")
def test_a_third_of_the_gap_on_text_that_the_demo_model_reads_here():
    from edgemoe import Engine
    from edgemoe.recorder import Recorder

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text += (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    with Engine.from_pretrained() as engine:
        recorder = Recorder(engine)
        recorder.read(engine.need_tokenizer().encode(text)[:1024])
        trace = recorder.trace()
    assert trace.num_steps == 1024 and trace.model == "demo"
    check_promise(trace, 1 / 3, [0.05, 0.15, 0.2, 0.25, 0.35, 0.5, 0.6])


@pytest.mark.skipif(not TRACES, reason="EDGEMOE_TRACES names no folder of recorded routings")
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "gpt-oss-120b"])
def test_the_promise_on_recorded_routings(name):
    path = Path(TRACES or "") / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"EDGEMOE_TRACES has no {name}")
    trace = Trace.load(path)
    check_promise(trace, 0.1, [0.05, 0.08, 0.125, 0.15, 0.2, 0.22])
    check_promise(trace, 0.0, [0.01, 0.03, 0.25, 0.5, 0.9])
    if name == "qwen3-30b-a3b":
        check_promise(trace, 0.1, [0.3, 0.35, 0.4, 0.45])
        assert hit_rates(trace, [0.03], ("forecast",))["forecast"][0] >= 0.25


@pytest.mark.skipif(not TRACES, reason="EDGEMOE_TRACES names no folder of recorded routings")
@pytest.mark.parametrize(
    ("name", "percents"),
    [("gpt-oss-120b", [*range(1, 29), 40, 90]), ("qwen3-30b-a3b", [2, 5, 35, 39, 42, 46, 49, 90])],
)
def test_no_budget_is_below_lru_on_recorded_routings(name, percents):
    """A grid of 1 %; of the slower one where a pool is nearest to LRU."""
    path = Path(TRACES or "") / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"EDGEMOE_TRACES has no {name}")
    check_promise(Trace.load(path), 0.0, [percent / 100 for percent in percents])
