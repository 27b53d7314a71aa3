"""Sampling: against transformers' logits processors, by properties, and on hostile parameters."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.runtime.errors import EdgeMoeError, UsageError
from edgemoe.runtime.reference import softmax
from edgemoe.sampling import (
    Sampler,
    SamplingParams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

torch.set_num_threads(1)  # small rows: threads would only wait for each other
VOCAB = 211


def random_logits(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return 4 * np.random.default_rng(seed).normal(size=vocab).astype(np.float32)


def processed(processor, logits: np.ndarray, ids: list[int] = ()) -> np.ndarray:
    rows = torch.tensor(logits[None])
    return processor(torch.tensor([list(ids)], dtype=torch.long), rows)[0].numpy()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_k=st.integers(1, VOCAB + 5),
    top_p=st.floats(0.0, 1.0),
    min_p=st.floats(0.0, 1.0),
    penalty=st.floats(0.25, 3.0),
)
def test_filters_equal_transformers(seed, top_k, top_p, min_p, penalty):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(seed)
    for ours, theirs in (
        (keep_top_k(logits, top_k), process.TopKLogitsWarper(top_k)),
        (keep_top_p(logits, top_p), process.TopPLogitsWarper(top_p)),
        (keep_min_p(logits, min_p), process.MinPLogitsWarper(min_p)),
    ):
        assert np.array_equal(ours, processed(theirs, logits))
    ids = [seed % VOCAB, (7 * seed) % VOCAB, 3, 3]
    ours = penalize_repetition(logits, np.array(sorted(set(ids))), penalty)
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)
    assert np.array_equal(ours, processed(theirs, logits, ids))


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 8.0])
def test_top_p_of_a_large_vocabulary_equals_transformers(scale):
    """Sharp distributions use the shortlist, flat ones need more of the vocabulary than it has."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(1, 50_000) * scale / 4
    for top_p in (0.0, 0.05, 0.5, 0.9, 0.999):
        expected = processed(process.TopPLogitsWarper(top_p), logits)
        ours = keep_top_p(logits, top_p)
        # summing 50,000 numbers in another order moves the border by their rounding at most
        differing = int((ours != expected).sum())
        assert differing <= 0.002 * int(np.isfinite(expected).sum())


def test_whole_chain_keeps_the_tokens_transformers_keeps():
    process = pytest.importorskip("transformers.generation.logits_process")
    params = SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.05, seed=1)
    chain = [
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(40),
        process.TopPLogitsWarper(0.8),
        process.MinPLogitsWarper(0.05),
    ]
    for seed in range(5):
        logits = random_logits(seed)
        expected = logits
        for processor in chain:
            expected = processed(processor, expected)
        allowed = set(np.flatnonzero(np.isfinite(expected)).tolist())
        sampler = Sampler(params)
        drawn = {sampler.choose(logits).token_id for _ in range(400)}
        assert drawn <= allowed
        likely = {i for i in allowed if softmax(expected)[i] > 0.05}
        assert likely <= drawn


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -math.inf], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=2.0, seed=7))
    counts = np.zeros(4)
    for _ in range(6000):
        counts[sampler.choose(logits).token_id] += 1
    expected = softmax(logits / 2)
    assert np.allclose(counts / 6000, expected, atol=0.02)
    assert counts[3] == 0


def test_temperature_equals_transformers_draw_for_draw():
    process = pytest.importorskip("transformers.generation.logits_process")
    for temperature in (0.3, 1.0, 2.5):
        logits = random_logits(3)
        warped = processed(process.TemperatureLogitsWarper(temperature), logits)
        a = Sampler(SamplingParams(temperature=temperature, seed=5))
        b = Sampler(SamplingParams(temperature=1.0, seed=5))
        assert [a.choose(logits) for _ in range(50)] == [b.choose(warped) for _ in range(50)]


def test_greedy_and_its_ties():
    logits = np.full(50, -1.0, dtype=np.float32)
    logits[[9, 17, 40]] = 2.5
    assert Sampler(SamplingParams()).choose(logits).token_id == 9
    assert Sampler(SamplingParams(temperature=1e-40, seed=0)).choose(logits).token_id == 9
    assert Sampler(SamplingParams(temperature=1.0, top_k=1, seed=0)).choose(
        random_logits(4)
    ).token_id == int(random_logits(4).argmax())
    assert Sampler(SamplingParams(temperature=1.0, top_p=0.0, seed=0)).choose(
        random_logits(5)
    ).token_id == int(random_logits(5).argmax())


def test_same_seed_same_draws_and_no_shared_state():
    params = SamplingParams(temperature=1.0, seed=42)
    rows = [random_logits(i) for i in range(40)]
    first = [c.token_id for c in map(Sampler(params).choose, rows)]
    np.random.seed(0)
    random.seed(0)
    other = Sampler(SamplingParams(temperature=1.0, seed=43))
    again, sampler = [], Sampler(params)
    for row in rows:
        other.choose(row)
        again.append(sampler.choose(row).token_id)
    assert first == again
    unseeded = Sampler(SamplingParams(temperature=1.0))
    drawn = [unseeded.choose(row).token_id for row in rows]
    repeat = Sampler(SamplingParams(temperature=1.0, seed=unseeded.seed))
    assert drawn == [repeat.choose(row).token_id for row in rows]


def test_presence_and_frequency_count_the_answer_only():
    logits = np.array([3.0, 2.9, 2.0, 0.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(presence_penalty=0.5), prompt=[0, 0, 0])
    assert [sampler.choose(logits).token_id for _ in range(3)] == [0, 1, 0]
    sampler = Sampler(SamplingParams(frequency_penalty=0.5))
    assert [sampler.choose(logits).token_id for _ in range(6)] == [0, 1, 0, 1, 0, 2]


def test_repetition_penalty_sees_prompt_and_answer():
    logits = np.array([3.0, 2.9, -1.0, 2.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.3), prompt=[0])
    assert [sampler.choose(logits).token_id for _ in range(2)] == [1, 0]


def test_logprobs_are_those_of_the_model():
    logits = random_logits(11)
    params = SamplingParams(
        temperature=0.3, top_k=3, repetition_penalty=1.5, presence_penalty=1.0, seed=1, logprobs=5
    )
    sampler = Sampler(params, prompt=range(100))
    expected = logits - logits.max()
    expected -= np.log(np.exp(expected).sum())
    likely = (-expected).argsort()[:5]
    for _ in range(3):
        choice = sampler.choose(logits)
        assert choice.logprob == float(expected[choice.token_id])
        assert [i for i, _ in choice.top_logprobs] == likely.tolist()
        assert [p for _, p in choice.top_logprobs] == expected[likely].tolist()
    greedy = Sampler(SamplingParams(logprobs=1)).choose(logits)
    assert greedy.top_logprobs == ((greedy.token_id, greedy.logprob),)
    assert Sampler(SamplingParams()).choose(logits).logprob is None


def test_input_logits_are_not_changed():
    logits = random_logits(2)
    before = logits.copy()
    params = SamplingParams(
        temperature=0.5, top_k=5, top_p=0.5, repetition_penalty=2.0, presence_penalty=1.0, seed=0
    )
    sampler = Sampler(params, prompt=[1, 2])
    sampler.choose(logits)
    sampler.choose(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0))
    for value in (math.nan, math.inf):
        with pytest.raises(EdgeMoeError, match="not finite"):
            sampler.choose(np.array([0.0, value, 1.0], dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("min_p", -1),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", True),
        ("max_tokens", -5),
        ("repetition_penalty", 0),
        ("presence_penalty", math.inf),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", 7),
        ("logprobs", -1),
    ],
)
def test_bad_parameters_are_named(name, value):
    with pytest.raises(UsageError, match=f"`{name}`"):
        SamplingParams(**{name: value})


def test_parameters_are_normalised():
    params = SamplingParams(stop="END", temperature=1, max_tokens=None)
    assert params.stop == ("END",) and isinstance(params.temperature, float)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    with pytest.raises(AttributeError):
        params.top_k = 3


def test_defaults_of_a_generation_config():
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": [1],
    }
    params = SamplingParams.from_config(config, top_k=5, seed=None)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 5, 0.95)
    assert SamplingParams.from_config({"temperature": 0.6}).temperature == 0.0
    assert SamplingParams.from_config({}, temperature=0.5).temperature == 0.5
    with pytest.raises(UsageError, match="`heat`"):
        SamplingParams.from_config({}, heat=1)
