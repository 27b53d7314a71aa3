"""Recorded routes in the place of the routers': the same arithmetic, and nothing of it stays."""

import numpy as np
import pytest
from stores_small import make_store

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.native import NativeLayers
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")

PROMPT = np.random.default_rng(6).integers(0, 400, 12).tolist()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("forced"), num_experts_per_tok=3)
    with Engine.from_pretrained(path, context=64, prefetch="none") as engine:
        yield engine


def context_of(engine: Engine) -> KVCache:
    kv_cache = KVCache.for_model(engine.args, engine.context, 16)
    engine.forward(PROMPT, kv_cache)
    return kv_cache


def random_routes(num_layers: int, num_experts: int, top_k: int, seed: int):
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.choice(num_experts, top_k, replace=False)) for _ in range(num_layers)]
    return np.array(ids), rng.random((num_layers, top_k))


class Rerouted:
    """An executor that computes other experts than it was asked for."""

    def __init__(self, executor, routes) -> None:
        self._executor, self._routes = executor, routes

    def run(self, layer, x, ids, weights):
        ids = self._routes[0][layer : layer + 1]
        weights = self._routes[1][layer : layer + 1].astype(np.float32)
        return self._executor.run(layer, x, ids, weights)

    def __getattr__(self, name):
        return getattr(self._executor, name)


def test_the_routes_of_the_routers_change_no_bit(engine):
    kv_cache, seen = context_of(engine), []
    expected = engine.forward([7], kv_cache, on_route=lambda *routing: seen.append(routing))
    kv_cache.trim(len(PROMPT))
    ids = np.concatenate([ids for _, ids, _ in seen])
    weights = np.concatenate([weights for _, _, weights in seen])
    assert np.array_equal(engine.forward([7], kv_cache, forced=(ids, weights)), expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_any_routes_are_computed_as_a_layer_at_a_time(engine, top_k):
    routes = random_routes(3, 8, top_k, seed=top_k)
    kv_cache = context_of(engine)
    plain = engine.forward([7], kv_cache)
    kv_cache.trim(len(PROMPT))

    layers, embed, norm, lm_head = engine._model._layers._weights
    executor = Rerouted(engine._executor, routes)
    slow = NativeLayers(engine.args, layers, embed, norm, lm_head, executor, None)
    expected = slow.logits(slow.run(np.array([7]), kv_cache, None))
    kv_cache.trim(len(PROMPT))

    seen = []
    options = {"forced": routes, "on_route": lambda *routing: seen.append(routing)}
    engine.take_step_stats()
    engine.cache.trim(0)
    engine.cache.trim(engine._full_capacity)
    forced = engine.forward([7], kv_cache, **options)
    assert np.array_equal(forced, expected) and not np.array_equal(forced, plain)
    assert engine.take_step_stats().misses == 3 * top_k
    assert np.array_equal(np.concatenate([ids for _, ids, _ in seen]), routes[0])
    kv_cache.trim(len(PROMPT))
    assert np.array_equal(engine.forward([7], kv_cache), plain)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1]] * 2, "shape"),
        ([[0, 1, 2, 3]] * 3, "shape"),
        ([[]] * 3, "shape"),
        ([[0, 1], [1, 0], [0, 1]], "ascending"),
        ([[0, 1], [1, 1], [0, 1]], "ascending"),
        ([[0, 1], [7, 8], [0, 1]], "of each layer"),
        ([[-1, 1], [0, 1], [0, 1]], "of each layer"),
    ],
)
def test_routes_that_cannot_be_are_refused(engine, ids, message):
    kv_cache = context_of(engine)
    plain = engine.forward([7], kv_cache)
    kv_cache.trim(len(PROMPT))
    with pytest.raises(UsageError, match=message):
        engine.forward([7], kv_cache, forced=(np.array(ids), np.ones(np.shape(ids))))
    assert np.array_equal(engine.forward([7], kv_cache), plain)


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_prompt_takes_routes_as_its_tokens_do_one_by_one(engine, top_k):
    every = [random_routes(3, 8, top_k, seed=seed) for seed in range(5)]
    kv_cache, tokens = context_of(engine), [7, 8, 9, 10, 11]
    rows = [
        engine.forward([token], kv_cache, forced=routes)
        for token, routes in zip(tokens, every, strict=True)
    ]
    kv_cache.trim(len(PROMPT))
    routes = tuple(np.stack(parts) for parts in zip(*every, strict=True))
    assert np.array_equal(
        engine.forward(tokens, kv_cache, "all", forced=routes), np.concatenate(rows)
    )


def test_routes_of_another_number_of_tokens_are_refused(engine):
    routes = random_routes(3, 8, 2, seed=0)
    with pytest.raises(UsageError, match="2 tokens"):
        engine.forward([7, 8], context_of(engine), forced=routes)
