"""Guesses: they change no bit, whatever the predictor, the policy and the room; what they cost is
counted; what goes wrong with one is nobody's error."""

import itertools
import zlib

import numpy as np
import pytest
from stores_small import make_store

from edgemoe.engine import DEMO, Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime import core
from edgemoe.runtime.errors import RecordError, UsageError
from edgemoe.runtime.policy import POLICIES
from edgemoe.runtime.predictors import noisy_oracle, profile_scores
from edgemoe.runtime.prefetch import GIVEN, GuessStats, Prefetcher, _core_tables
from edgemoe.runtime.profile import Profile
from edgemoe.runtime.transitions import BACK_OFF

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")

PROMPT = np.random.default_rng(9).integers(0, 400, 12).tolist()
PLACES, NUM_EXPERTS, TOP_K = 3, 8, 2
CONTEXT = 512
PREDICTORS = ("none", "previous", "profile", "router", "oracle", "wrong")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("prefetch"))


@pytest.fixture(scope="module")
def text(path):
    """Greedy tokens after PROMPT with their routes [T, places, K] and the checksum of all logits,
    everything resident."""
    with Engine.from_pretrained(path, context=CONTEXT, prefetch="none") as engine:
        engine.cache.preload()
        return greedy(engine, 256)


def greedy(engine, num_tokens, guesses=None):
    """(tokens, routes, checksum of the logits) of `num_tokens` decoded after PROMPT."""
    kv_cache = KVCache.for_model(engine.args, engine.context, 16)
    logits = engine.forward(PROMPT, kv_cache)
    crc, tokens, routes = 0, [], []
    for step in range(num_tokens):
        tokens.append(int(logits[0].argmax()))
        seen = []
        logits = engine.forward(
            tokens[-1:],
            kv_cache,
            on_route=lambda layer, ids, weights, seen=seen: seen.append(ids[0]),
            **({} if guesses is None else {"guesses": guesses[step]}),
        )
        routes.append(seen)
        crc = zlib.crc32(logits.tobytes(), crc)
    return tokens, np.array(routes), crc


def use(engine, predictor, routes=None, depth=2, is_forced=True):
    """Have the engine guess by this predictor; returns it and the guesses that go with tokens."""
    engine.prefetch.close()
    profile, guesses = None, None
    if predictor == "profile":
        profile = Profile.empty(dict.fromkeys(range(PLACES), NUM_EXPERTS), TOP_K)
        profile.add_routes(routes)
    if predictor in ("oracle", "wrong"):
        right = float(predictor == "oracle")
        guesses = noisy_oracle(routes, [NUM_EXPERTS] * PLACES, right)
        predictor = GIVEN
    prefetch = Prefetcher(predictor, PLACES, profile, depth, is_forced)
    engine.prefetch = prefetch
    engine._model.guess_with(prefetch)
    return prefetch, guesses


def resize(engine, num_records):
    """An expert cache with room for so many records, and nothing in it."""
    engine.cache.trim(0)
    engine.cache.trim(num_records * largest(engine))


def largest(engine):
    return max(record.num_bytes for record in engine._index.records.values())


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_bit_depends_on_guesses(path, text, policy):
    """EdgeMoE's acceptance: capacities x predictors x policies, 256 greedy tokens each."""
    tokens, routes, crc = text
    with Engine.from_pretrained(path, context=CONTEXT, policy=policy) as engine:
        for room, predictor in itertools.product((2, 4, 10, 24), PREDICTORS):
            resize(engine, room)
            prefetch, guesses = use(engine, predictor, routes)
            found = greedy(engine, 256, guesses)
            assert found[0] == tokens and found[2] == crc, (room, predictor)
            stats = prefetch.stats()
            if room < 24 and predictor not in ("none", "previous"):
                assert stats.num_guesses > 0, (room, predictor)
            settled = stats.num_in_time + stats.num_late + stats.num_dropped + stats.num_failed
            assert settled <= stats.num_guesses and stats.num_failed == 0
            assert engine.cache.pinned_bytes == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_known_is_read_ahead_and_what_is_wrong_is_not_kept_from_demand(path, text, depth):
    _, routes, crc = text
    with Engine.from_pretrained(path, context=CONTEXT) as engine:
        counts = {}
        for predictor in ("none", "oracle", "wrong"):
            resize(engine, 8)
            prefetch, guesses = use(engine, predictor, routes, depth)
            engine.take_step_stats()
            assert greedy(engine, 256, guesses)[2] == crc
            counts[predictor] = engine.take_step_stats(), prefetch.stats()
        demand = counts["none"][0]
        step, stats = counts["oracle"]
        # Every absent record was guessed before its router spoke, and used; but for the prompt.
        assert step.guessed == stats.num_in_time + stats.num_late > 100
        assert step.misses < 0.1 * demand.misses + 24
        assert stats.num_dropped == 0
        step, stats = counts["wrong"]
        assert stats.num_guesses > 100 and stats.num_dropped + stats.wasted_bytes > 0
        # A wrong guess that was read may still serve a later token.
        assert step.hits + step.misses + step.guessed == demand.hits + demand.misses


def test_a_shut_gate_reads_nothing_and_still_looks(path, text):
    """Nothing is ever waited for, so that there is nothing to gain."""
    _, routes, crc = text
    with Engine.from_pretrained(path, context=CONTEXT) as engine:
        engine.cache.preload()
        prefetch, _ = use(engine, "router", is_forced=False)
        assert greedy(engine, 256)[2] == crc
        assert prefetch.stats() == GuessStats()  # nothing was absent


def test_nothing_is_read_before_it_is_known_how_often_guesses_are_right():
    with Engine.from_pretrained(DEMO, context=CONTEXT, prefetch="router") as engine:
        resize(engine, 20)
        engine.reader.throttle(500_000_000)  # so that there is much to wait for
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        for token_id in range(100, 132):  # the first half of those that the gate learns from
            engine.forward([token_id], kv_cache)
        stats = engine.prefetch.stats()
        assert stats.num_layers > 0 and stats.num_guesses == 0


@pytest.mark.parametrize("predictor", ["auto", "none", "previous", "router"])
def test_gated_guesses_change_no_bit(path, text, predictor):
    tokens, _, crc = text
    with Engine.from_pretrained(path, context=CONTEXT, prefetch=predictor) as engine:
        resize(engine, 7)
        assert greedy(engine, 256)[::2] == (tokens, crc)
        report = engine.report()["prefetch"]
        assert report["predictor"] == {"auto": "router"}.get(predictor, predictor)
        assert 0 <= report["open_share"] <= 1
        assert (report["num_layers"] > 0) == (predictor != "none")


def test_statistics_of_an_answer_tell_of_its_guesses(path, text):
    _, routes, _ = text
    with Engine.from_pretrained(path, context=CONTEXT) as engine:
        use(engine, "router")
        resize(engine, 6)
        first = engine.generate(PROMPT).stats
        resize(engine, 6)
        stats = engine.generate(PROMPT[:6]).stats
        total = engine.prefetch.stats()
        for name in ("num_guesses", "num_in_time", "num_late", "wasted_bytes"):
            assert first.prefetch[name] + stats.prefetch[name] == getattr(total, name)
        assert stats.guessed == stats.prefetch["num_in_time"] + stats.prefetch["num_late"] > 0
        assert stats.hit_rate == stats.hits / (stats.hits + stats.misses + stats.guessed)
        assert stats.to_dict()["prefetch"]["predictor"] == "router"


def test_without_the_core_there_are_no_guesses(path):
    with Engine.from_pretrained(path, context=64, backend="reference") as engine:
        assert engine.report()["prefetch"]["predictor"] == "none"


def test_a_profile_must_be_there(path):
    with pytest.raises(UsageError, match="no profile to predict by"):
        Engine.from_pretrained(path, context=64, prefetch="profile")
    with pytest.raises(UsageError, match="bad option `prefetch`"):
        Engine.from_pretrained(path, context=64, prefetch="clairvoyant")


def test_the_profile_of_the_store_is_used(path, text):
    profile = Profile.empty(dict.fromkeys(range(PLACES), NUM_EXPERTS), TOP_K)
    profile.add_routes(text[1])
    profile.save(path / "profile.safetensors")
    try:
        with Engine.from_pretrained(path, context=CONTEXT, prefetch="profile") as engine:
            assert engine.report()["prefetch"]["predictor"] == "profile"
            resize(engine, 7)
            assert greedy(engine, 256)[2] == text[2]
            assert engine.prefetch.stats().num_layers > 0
    finally:
        (path / "profile.safetensors").unlink()


def test_the_core_scores_as_the_tables_do(text):
    tokens, routes, _ = text
    profile = Profile.empty(dict.fromkeys(range(PLACES), NUM_EXPERTS), TOP_K)
    profile.add_routes(routes[:200], token_ids=[tokens[:200]])
    held = routes[200:].astype(np.int32)
    flat, num_paths_met = held.reshape(-1, TOP_K), 0
    for place in range(PLACES):
        tables = profile.tables(place)
        native = _core_tables(tables)
        expected = profile_scores(profile, place, held, tokens[200:])
        num_paths_met += len(tables.paths.key)
        for token in range(1, len(held)):
            at = token * PLACES + place
            active, before = flat[at - 1].copy(), flat[at - 2].copy()
            scores = np.zeros(NUM_EXPERTS, dtype=np.float32)
            core.lib.em_profile_scores(
                native, BACK_OFF, NUM_EXPERTS, before.ctypes.data, TOP_K, active.ctypes.data, TOP_K,
                tokens[200 + token], scores.ctypes.data,
            )  # fmt: skip
            assert np.allclose(scores, expected[token - 1], rtol=1e-6, atol=0)
    assert num_paths_met > 0


def test_bad_guesses_are_refused_or_passed_over(path, text):
    tokens, routes, crc = text
    with Engine.from_pretrained(path, context=CONTEXT) as engine:
        resize(engine, 6)
        use(engine, "oracle", routes)
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        engine.forward(PROMPT, kv_cache)
        with pytest.raises(UsageError, match="do not go with this model"):
            engine.forward([1], kv_cache, guesses=np.zeros((2, 2)))
        with pytest.raises(UsageError, match="single token"):
            engine.forward([1, 2], kv_cache, guesses=np.zeros((3, 2)))
        # Experts that no layer has, none at all, the same twice, more than are looked at.
        odd = np.tile(np.array([99, -1, 3, 3, 0, 1, 2, -7], dtype=np.int32), (256, PLACES, 1))
        assert greedy(engine, 256, odd)[2] == crc


def damage(path, record):
    with open(path / "experts.safetensors", "r+b") as file:
        file.seek(record.offset + 100)
        good = file.read(6)
        file.seek(record.offset + 100)
        file.write(b"damage")
    return good


def test_a_guess_that_cannot_be_read_fails_no_token(tmp_path):
    """One expert's record is damaged: a token that does not want it goes on, one that does names
    it, and both can be repeated."""
    path = make_store(tmp_path)
    seen = []
    with Engine.from_pretrained(path, context=64) as engine:
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        for token in (5, 7):
            expected = engine.forward(
                [token], kv_cache, on_route=lambda layer, ids, _: seen.append((layer, ids[0]))
            )
    wanted = {int(e) for layer, ids in seen if layer == 1 for e in ids}
    expert = next(e for e in range(NUM_EXPERTS) if e not in wanted)
    with Engine.from_pretrained(path, context=64, io="buffered") as engine:
        good = damage(path, engine._index.records[1, expert])
        prefetch, _ = use(engine, "oracle", np.zeros((1, PLACES, TOP_K), dtype=np.int32))
        resize(engine, 6)
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        engine.forward([5], kv_cache)
        guesses = np.array([[-1], [expert], [-1]])
        while prefetch.stats().num_failed < 3:
            assert np.array_equal(engine.forward([7], kv_cache, guesses=guesses), expected)
            kv_cache.trim(1)
        # Demanded, it is read anew: an error that names it while it is damaged, then nothing.
        ids = np.tile(np.sort([expert, (expert + 1) % NUM_EXPERTS]), (PLACES, 1))
        options = {"forced": (ids, np.full(ids.shape, 0.5)), "guesses": guesses}
        with pytest.raises(RecordError, match=f"layers.1.experts.{expert}"):
            engine.forward([7], kv_cache, **options)
        assert engine.cache.pinned_bytes == 0 and kv_cache.offset == 1
        with open(path / "experts.safetensors", "r+b") as file:
            file.seek(engine._index.records[1, expert].offset + 100)
            file.write(good)
        assert np.isfinite(engine.forward([7], kv_cache, **options)).all()
        kv_cache.trim(1)
        assert np.array_equal(engine.forward([7], kv_cache, guesses=guesses), expected)


def test_prompts_trims_and_closing_may_come_while_guesses_are_read(path, text):
    """Slow reads, so that some are always under way."""
    tokens, routes, crc = text
    engine = Engine.from_pretrained(path, context=CONTEXT)
    with engine:
        for turn in range(3):
            resize(engine, 8)
            engine.reader.throttle(20_000_000)
            use(engine, ("wrong", "oracle", "router")[turn], routes)
            _, guesses = use(engine, "wrong", routes)
            kv_cache = KVCache.for_model(engine.args, engine.context, 16)
            logits = engine.forward(PROMPT, kv_cache)
            for step in range(6):
                logits = engine.forward(tokens[step : step + 1], kv_cache, guesses=guesses[step])
            again = KVCache.for_model(engine.args, engine.context, 16)
            engine.forward(PROMPT + tokens[:5], again)
            assert np.array_equal(engine.forward(tokens[5:6], again), logits)
            engine.forward(tokens[6:7], kv_cache, guesses=guesses[6])
        engine.forward(tokens[7:8], kv_cache, guesses=guesses[7])
    assert engine.closed


@pytest.mark.parametrize("predictor", ["previous", "profile", "router", "wrong"])
def test_an_expert_that_no_router_may_choose_is_not_guessed(path, text, predictor):
    """With a mask (a hard set) that comes in the middle of a text."""
    _, routes, _ = text
    options = {"context": CONTEXT, "prefetch": "none", "warm_start": "off"}
    with Engine.from_pretrained(path, **options) as engine:
        prefetch, guesses = use(engine, predictor, routes)
        greedy(engine, 3, guesses)
        resize(engine, 3)
        before = np.array(engine.reader.landed_ns)
        mask = np.array([1, 1, 0, 1, 0, 0, 1, 0], dtype=np.uint8)
        engine._model.set_masks(dict.fromkeys(range(PLACES), mask))
        counts = prefetch.stats()
        greedy(engine, 64, guesses)
        has_landed = (np.array(engine.reader.landed_ns) != before).reshape(PLACES, NUM_EXPERTS)
        assert has_landed[:, mask != 0].all() and not has_landed[:, mask == 0].any()
        if predictor != "previous":
            assert (prefetch.stats() - counts).num_guesses > 0
