"""Fewer experts than top-k, and routers whose rows share bodies; what looks at routes then."""

import numpy as np
import pytest
from stores_small import make_store

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.moe import Router
from edgemoe.models.routes import choose
from edgemoe.models.rules import Rule
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.profile import Profile
from edgemoe.runtime.reference import softmax
from edgemoe.runtime.transitions import PlaceTables, path_keys
from edgemoe.session import Session

PROMPT = np.random.default_rng(8).integers(0, 400, 40).tolist()
BACKENDS = ["reference"] + ["native"] * (core.lib is not None)
NATIVE = pytest.mark.skipif(core.lib is None, reason="native core not built")
# Rows 0 and 5 share a body, as do 3 and 4; row 7 is a null expert.
BODIES = np.array([0, 1, 2, 3, 3, 0, 4, -1], dtype=np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("routes"), num_experts_per_tok=3)


def logits_of(engine: Engine, ids=PROMPT, split: int = 30) -> np.ndarray:
    """Of a prompt of `split` tokens, and of the others one by one."""
    kv_cache = KVCache.for_model(engine.args, engine.context, 16)
    rows = [engine.forward(ids[:split], kv_cache, "all")]
    rows += [engine.forward([token], kv_cache) for token in ids[split:]]
    return np.concatenate(rows)


class Rerouted:
    """An executor that computes other experts than it was asked for, `change`d [T, K]."""

    def __init__(self, executor, change) -> None:
        self._executor, self._change = executor, change

    def run(self, layer, x, ids, weights):
        return self._executor.run(layer, x, *self._change(layer, ids, weights))

    def __getattr__(self, name):
        return getattr(self._executor, name)


# ---- fewer than K -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_none_are_neither_read_nor_computed(path, backend):
    """Routes with -1 are those without, bit for bit where the core runs; only records that are
    named land."""
    tolerance = 0.0 if backend == "native" else 1e-4  # between a prompt and its tokens
    with Engine.from_pretrained(path, backend=backend, context=64, warm_start="off") as engine:
        x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
        ids = np.array([[2, -1, -1], [2, 6, -1], [-1, -1, -1], [6, -1, -1], [2, -1, -1]])
        weights = np.random.default_rng(2).random((5, 3), dtype=np.float32)
        weights = np.where(ids >= 0, weights, np.float32(0))
        engine.take_step_stats()
        y = engine._executor.run(1, x, ids, weights)
        stats = engine.take_step_stats()
        assert (stats.hits, stats.misses) == (0, 2)
        landed = np.asarray(engine.reader.landed_ns)
        assert sorted(np.flatnonzero(landed)) == [8 + 2, 8 + 6]
        assert not y[2].any() and y[[0, 1, 3, 4]].all(axis=-1).any()
        for t in range(5):
            num = int((ids[t] >= 0).sum())
            alone = engine._executor.run(1, x[t : t + 1], ids[t : t + 1], weights[t : t + 1])
            assert np.allclose(alone[0], y[t], rtol=tolerance, atol=tolerance)
            if num:
                short = (ids[t : t + 1, :num], weights[t : t + 1, :num])
                assert np.array_equal(engine._executor.run(1, x[t : t + 1], *short), alone)
        with pytest.raises(UsageError, match="-1 for none"):
            engine._executor.run(1, x, ids - 1, weights)


@NATIVE
@pytest.mark.parametrize("prefetch", ["none", "previous", "router"])
def test_the_core_decodes_ragged_routes(path, prefetch):
    """Forced routes with -1: those of a prompt of as many tokens, bit for bit; hits and misses
    count what is active."""
    rng = np.random.default_rng(3)
    ids = np.sort(rng.permuted(np.tile(np.arange(8), (10, 3, 1)), axis=2)[:, :, :3], axis=2)
    weights = rng.random((10, 3, 3)).astype(np.float32)
    for t, place in np.ndindex(10, 3):
        num = (t + place) % 4
        ids[t, place, num:], weights[t, place, num:] = -1, 0.0
    options = {"context": 64, "prefetch": prefetch, "warm_start": "off"}
    with Engine.from_pretrained(path, cache_bytes=1 << 16, **options) as engine:
        kv_cache = KVCache.for_model(engine.args, 64, 16)
        expected = engine.forward(PROMPT[:10], kv_cache, "all", forced=(ids, weights))
        kv_cache.trim(0)
        engine.take_step_stats()
        for t, token in enumerate(PROMPT[:10]):
            seen = []
            row = engine.forward(
                [token],
                kv_cache,
                forced=(ids[t], weights[t]),
                on_route=lambda *routes, seen=seen: seen.append(routes),
            )
            assert np.array_equal(row[0], expected[t])
            assert np.array_equal(np.concatenate([r[1] for r in seen]), ids[t])
        stats = engine.take_step_stats()
        assert stats.hits + stats.misses + stats.guessed == (ids >= 0).sum()
        bad = ids[0].copy()
        bad[0] = [-1, 2, 3]
        with pytest.raises(UsageError, match="then -1"):
            engine.forward([7], kv_cache, forced=(bad, weights[0]))


@NATIVE
@pytest.mark.parametrize("rule", [Rule(), Rule(2), Rule(1), Rule(top_p=0.5), Rule(2, top_p=0.7)])
def test_a_rule_changes_neither_bits_nor_counts_by_path(path, rule):
    """Prompt and decoded tokens agree, for every capacity; demand is of active experts."""
    seen = {}
    for cache_bytes in (1 << 16, None):
        options = {"context": 64, "cache_bytes": cache_bytes, "warm_start": "off"}
        with Engine.from_pretrained(path, **options) as engine:
            engine._model.set_rule(rule)
            counts = []
            engine.on_route = lambda _, ids, w, counts=counts: counts.append((ids >= 0).sum())
            rows = logits_of(engine)
            seen[cache_bytes] = rows
            engine.on_route = None
            assert np.array_equal(logits_of(engine, split=40), rows)
            engine.take_step_stats()
            logits_of(engine, split=1)
            stats = engine.take_step_stats()
            demanded = stats.hits + stats.misses + stats.guessed
            assert demanded == sum(counts)
            if rule.top_p == 0:
                assert demanded == 40 * 3 * (rule.active_experts or 3)
            engine._model.set_rule(Rule())
            full = logits_of(engine)
            assert np.array_equal(full, rows) == rule.is_plain
    assert np.array_equal(seen[1 << 16], seen[None])


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9, 0.999999, 1.0])
def test_top_p_in_the_reference_is_the_paper_s_rule(p, renormalise):
    """2403.07652: sorted shares until their sum exceeds p, weights as they are; ties to the lowest
    ids; at least one, at most K."""
    logits = np.float32(3) * np.random.default_rng(4).normal(size=(200, 12)).astype(np.float32)
    logits[::3, 5] = logits[::3, 2]
    scores = softmax(logits)
    ids, weights = choose(Rule(top_p=p), scores, np.arange(12), 4, renormalise)
    for t, row in enumerate(scores.tolist()):
        order = sorted(range(12), key=lambda e, row=row: (-row[e], e))[:4]
        taken, total = [], 0.0
        for e in order:
            if taken and p < 1 and total > np.float32(p):
                break
            taken.append(e)
            total += row[e]
        divisor = sum(row[e] for e in order) if renormalise else 1.0
        assert ids[t].tolist() == sorted(taken) + [-1] * (4 - len(taken))
        expected = [row[e] / divisor for e in sorted(taken)] + [0.0] * (4 - len(taken))
        assert np.allclose(weights[t], expected, rtol=2e-6)


# ---- rows that share bodies ---------------------------------------------------------------------


def map_rows(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The naive routes: every row's body, each alias on its own; nulls weigh nothing."""
    bodies = BODIES.astype(np.int64)[ids.astype(np.int64)]
    return bodies.clip(0), np.where(bodies >= 0, weights, np.float32(0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_aliases_of_one_token_are_the_naive_sum(path, backend):
    """Each alias computed on its own and added up, within rounding; both of them were chosen."""
    num_both = 0

    def naive(layer, x, ids, weights):
        nonlocal num_both
        num_both += int(((ids == 3).any(1) & (ids == 4).any(1)).sum())
        bodies, weights = map_rows(ids, weights)
        y = np.zeros_like(x)
        for k in range(3):
            part = slice(k, k + 1)
            y += executor.run(layer, x, bodies[:, part], weights[:, part])
        return y

    with Engine.from_pretrained(path, backend=backend, context=64) as engine:
        executor = engine._executor
        run, executor_run = naive, executor.run
        # As many rows, whose experts are computed alone: what the map must amount to.
        layers = engine._model._layers
        kind, weights = type(layers), layers.weights
        slow = kind(engine.args, weights, *_trunk(layers), _Runs(executor, run), None)
        kv_cache = KVCache.for_model(engine.args, 64, 32)
        expected = slow.logits(slow.run(np.array(PROMPT), kv_cache, None))
        assert executor.run == executor_run and num_both > 0
        engine._model.set_bodies(dict.fromkeys(range(3), BODIES))
        kv_cache.trim(0)
        found = engine.forward(PROMPT, kv_cache, "all")
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


class _Runs:
    def __init__(self, executor, run) -> None:
        self._executor, self.run = executor, run

    def __getattr__(self, name):
        return getattr(self._executor, name)


def _trunk(layers):
    """Embedding, norm and lm_head of either backend's layers."""
    if hasattr(layers, "_weights"):
        return layers._weights[1:]
    return layers._embed, layers._norm._weight, layers._lm_head


@NATIVE
@pytest.mark.parametrize("renormalise", [False, True])
def test_the_core_maps_rows_as_the_reference_does(tmp_path, monkeypatch, renormalise):
    """Of the same router input: the same bodies, weights within rounding; with rules on top."""
    path = make_store(tmp_path, num_experts_per_tok=3, norm_topk_prob=renormalise)
    gains = np.array([1, 0.5, 1, 2, 1, 1, 0, 1], dtype=np.float32)
    with Engine.from_pretrained(path, context=64) as engine, Session(engine) as session:
        seen, run = [], engine._executor.run

        def watch(layer, x, ids, weights):
            seen.append((layer, x.copy(), ids.astype(np.int64), weights.copy()))
            return run(layer, x, ids, weights)

        monkeypatch.setattr(engine._executor, "run", watch)
        engine._model.set_bodies({0: BODIES, 1: BODIES})
        for rule in (Rule(), Rule(2), Rule(top_p=0.6)):
            engine._model.set_rule(rule)
            for tuned in ({}, {1: gains}):
                engine._model.set_gains(tuned)
                session.reset()
                session.logits(PROMPT)
                for layer, x, ids, weights in seen:
                    router = Router(engine.args, engine._model._layers.weights[layer].router)
                    router.rule = rule
                    router.set_bodies(BODIES if layer < 2 else None)
                    router.set_gains(tuned.get(layer))
                    expected_ids, expected_weights = router(x)
                    assert np.array_equal(ids, expected_ids)
                    assert np.allclose(weights, expected_weights, rtol=4e-6, atol=1e-9)
                assert any((ids < 0).any() for _, _, ids, _ in seen)
                seen.clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_aliases_share_one_record_and_nulls_read_nothing(path, backend):
    with Engine.from_pretrained(path, backend=backend, context=64, warm_start="off") as engine:
        engine._model.set_bodies(dict.fromkeys(range(3), BODIES))
        ids = PROMPT if backend == "native" else PROMPT[:12]
        logits_of(engine, ids, 10)
        landed = np.asarray(engine.reader.landed_ns).reshape(3, 8)
        assert landed[:, :5].any() and not landed[:, 5:].any()
        assert engine.reader.stats()["num_reads"] == (landed != 0).sum()


@NATIVE
@pytest.mark.parametrize("prefetch", ["router", "previous"])
def test_bits_of_a_mapped_model_do_not_depend_on_memory(path, prefetch):
    rows = []
    for cache_bytes in (1 << 16, None):
        options = {"context": 64, "cache_bytes": cache_bytes, "prefetch": prefetch}
        with Engine.from_pretrained(path, **options) as engine:
            plain = logits_of(engine)
            engine._model.set_bodies(dict.fromkeys(range(3), BODIES))
            rows.append(logits_of(engine))
            assert np.array_equal(logits_of(engine, split=1), rows[0])
            engine._model.set_bodies({})
            assert np.array_equal(logits_of(engine), plain)
    assert np.array_equal(*rows) and not np.array_equal(rows[0], plain)


# ---- what looks at routes afterwards ------------------------------------------------------------


def ragged(num_tokens: int, seed: int) -> np.ndarray:
    """Routes [T, 2, 3] of 6 experts, some with fewer than 3, as the product of full ones."""
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(6), (num_tokens, 2, 1)), axis=2)[:, :, :3]
    ids = np.sort(ids, axis=2).astype(np.int16)
    for t, place in np.ndindex(num_tokens, 2):
        ids[t, place, 1 + (t + place) % 3 :] = -1
    return ids


def test_profiles_count_what_is_active():
    routes = ragged(200, 5)
    profile = Profile.empty({0: 6, 1: 6}, 3)
    profile.add_routes(routes, token_ids=[np.arange(200) % 7])
    profile.validate()
    for place, sums in enumerate(profile.layers.values()):
        rows = routes[:, place]
        assert np.array_equal(sums.hard_count, np.bincount(rows[rows >= 0], minlength=6))
        after = np.zeros((6, 6), dtype=np.int64)
        for now, then in zip(rows[:-1], rows[1:], strict=True):
            for a in now[now >= 0]:
                after[a, then[then >= 0]] += 1
        assert np.array_equal(sums.token_count, after)
        assert sums.tokens.count.sum() == (rows >= 0).sum()
        tables = profile.tables(place)
        scores = tables.score_rows(rows[:5], rows[1:6], np.arange(5))
        for t in range(5):
            short = [row[row >= 0] for row in (rows[t], rows[1 + t])]
            assert np.allclose(scores[t], tables.scores(*short, t), rtol=1e-6)


def test_a_path_s_key_is_that_of_its_active_ids():
    before, now = ragged(30, 6)[:, 0], ragged(30, 7)[:, 1]
    keys = path_keys(before, now)
    for t in range(30):
        short = path_keys(*(row[t][row[t] >= 0][None] for row in (before, now)))
        assert keys[t] == short[0]


@NATIVE
def test_the_core_scores_ragged_choices_as_numpy_does():
    from edgemoe.runtime.prefetch import _core_tables

    routes = ragged(300, 8)
    profile = Profile.empty({0: 6, 1: 6}, 3)
    profile.add_routes(routes, token_ids=[np.arange(300) % 5])
    tables: PlaceTables = profile.tables(1)
    table = _core_tables(tables)
    for t in range(1, 20):
        active, before = routes[t, 0], routes[t - 1, 1]
        expected = tables.scores(active, before, t % 5)
        parts = [np.ascontiguousarray(r[r >= 0], dtype=np.int32) for r in (before, active)]
        found = np.empty(6, dtype=np.float32)
        core.lib.em_profile_scores(
            table,
            2.0,
            6,
            parts[0].ctypes.data,
            len(parts[0]),
            parts[1].ctypes.data,
            len(parts[1]),
            t % 5,
            found.ctypes.data,
        )
        assert np.allclose(found, expected, rtol=1e-5)
