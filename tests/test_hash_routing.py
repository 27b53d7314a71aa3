"""Hash-routed layers: the token id gives the experts, the router weighs them, and what they will
demand is read before their router runs. Hash Layers, 2106.04426; tables as DeepSeek-V4 has them."""

import itertools
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hashed_small import (
    NUM_EXPERTS,
    NUM_HASHED,
    NUM_LAYERS,
    TOP_K,
    make_source,
    make_store,
    random_table,
    table_name,
)
from safetensors.torch import load_file

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models import parse_config
from edgemoe.quant.convert import convert
from edgemoe.quant.plan import ConvertOptions
from edgemoe.runtime import core
from edgemoe.runtime.errors import CheckpointError, FormatError, RecordError, UnsupportedModelError
from edgemoe.runtime.policy import POLICIES
from edgemoe.runtime.prefetch import Prefetcher
from edgemoe.runtime.store import Store

PROMPT = np.random.default_rng(3).integers(0, 400, 12).tolist()
CONTEXT = 128
needs_core = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("hashed"))


def expected_ids(layer: int, ids: list[int]) -> np.ndarray:
    return np.sort(random_table(layer).numpy()[ids], axis=1)


def run(engine, ids, num_tokens=0):
    """(logits, routes and weights by call) of a prompt and of tokens one by one behind it."""
    kv_cache, seen = KVCache.for_model(engine.args, engine.context, 32), []

    def note(layer, experts, weights):
        seen.append((layer, experts, weights))

    split = len(ids) - num_tokens
    rows = [engine.forward(ids[:split], kv_cache, "all", on_route=note)]
    rows += [engine.forward([token], kv_cache, on_route=note) for token in ids[split:]]
    return np.concatenate(rows), seen


def greedy(engine, num_tokens):
    """(tokens, checksum of the logits) of what follows PROMPT, no route being asked for."""
    kv_cache, crc, tokens = KVCache.for_model(engine.args, engine.context, 16), 0, []
    logits = engine.forward(PROMPT, kv_cache)[0]
    for _ in range(num_tokens):
        tokens.append(int(logits.argmax()))
        logits, _ = engine.step(tokens[-1], kv_cache)
        crc = zlib.crc32(logits.tobytes(), crc)
    return tokens, crc


def resize(engine, num_records):
    largest = max(record.num_bytes for record in engine._index.records.values())
    engine.cache.trim(0)
    engine.cache.trim(num_records * largest)


# ---- what is computed ---------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_the_table_chooses_and_the_router_weighs(tmp_path, model_type):
    """Both backends, every family: ids are the table's, weights those of the softmax over all."""
    path = make_store(tmp_path, model_type, bits=16, **_all_sparse(model_type))
    found = {}
    for backend in ("native", "reference"):
        with Engine.from_pretrained(path, context=CONTEXT, backend=backend) as engine:
            found[backend] = run(engine, PROMPT, num_tokens=4)
            assert engine.report()["hash_routed"]["layers"] == list(range(NUM_HASHED))
            renormalise = engine.args.norm_topk
    native, reference = found["native"], found["reference"]
    assert np.allclose(native[0], reference[0], atol=2e-3 * native[0].std())
    for (_, ids, weights), (_, other, others) in zip(native[1], reference[1], strict=True):
        assert np.array_equal(ids, other)
        assert np.allclose(weights, others, atol=1e-3)
        if renormalise:
            assert np.allclose(weights.sum(axis=1), 1.0)
    for layer in range(NUM_HASHED):
        ids = np.concatenate([ids for number, ids, _ in native[1] if number == layer])
        assert np.array_equal(ids, expected_ids(layer, PROMPT))


def _all_sparse(model_type: str) -> dict:
    return {"mlp_only_layers": []} if model_type == "qwen2_moe" else {}


@needs_core
def test_a_table_of_the_routers_own_choices_changes_no_bit(tmp_path):
    """With one token in the context, a layer's choice depends on the id alone: a model whose table
    holds just what its router would choose gives the logits of the model without the table."""
    plain = make_store(tmp_path / "plain", bits=16, num_hash_layers=0)
    with Engine.from_pretrained(plain, context=CONTEXT) as engine:
        rows = [run(engine, [token]) for token in range(40)]
    chosen = [[ids[0] for layer, ids, _ in seen if layer == 0][0] for _, seen in rows]

    def fill(weights):
        weights.update(load_file(tmp_path / "plain" / "source" / "model.safetensors"))
        table = random_table(0)
        table[: len(chosen)] = torch.from_numpy(np.array(chosen)).flip(1)
        weights[table_name(0)] = table

    hashed = make_store(tmp_path / "hashed", bits=16, num_hash_layers=1, change=fill)
    with Engine.from_pretrained(hashed, context=CONTEXT) as engine:
        for token, (logits, _) in enumerate(rows):
            assert np.array_equal(run(engine, [token])[0], logits)


def test_other_spellings_and_tables_of_32_bits(tmp_path):
    def narrow(weights):
        for layer in range(NUM_HASHED):
            weights[table_name(layer)] = random_table(layer, torch.int32)

    kinds = ["hash_moe"] * NUM_HASHED + ["moe"] * (NUM_LAYERS - NUM_HASHED)
    path = make_store(tmp_path, change=narrow, num_hash_layers=None, mlp_layer_types=kinds)
    assert parse_config(Store(path).index.config).hash_layers == tuple(range(NUM_HASHED))
    with Store(path) as store:
        entry = store.trunk_entry(table_name(1))
        assert (entry.dtype, entry.shape) == ("I32", (416, TOP_K))
        assert np.array_equal(store.trunk_tensor(table_name(1)), random_table(1).numpy())


# ---- what is read, and when ---------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_bit_depends_on_room_predictor_or_policy(path, policy):
    with Engine.from_pretrained(path, context=CONTEXT, policy=policy) as engine:
        engine.cache.preload()
        expected = greedy(engine, 32)
        for room, predictor in itertools.product((2, 4, 9), ("none", "previous", "router")):
            resize(engine, room)
            engine.prefetch.close()
            prefetch = Prefetcher(predictor, NUM_LAYERS, is_forced=True)
            engine.use_prefetch(prefetch)
            assert greedy(engine, 32) == expected, (room, predictor)
            assert engine.cache.pinned_bytes == 0
            prefetch.close()


@needs_core
def test_every_demand_of_these_layers_is_begun_before_their_router_runs(path):
    """With room for two layers, no record of a hash-routed layer is ever a miss of a token; those
    of the others are, with nothing guessed."""
    with Engine.from_pretrained(path, context=CONTEXT, prefetch="none") as engine:
        for room in (2 * TOP_K, 3 * TOP_K, 20):
            resize(engine, room)
            kv_cache = KVCache.for_model(engine.args, engine.context, 16)
            engine.forward(PROMPT, kv_cache)
            before = engine.cache.place_stats.copy()
            reads = engine.cache.foreseen[0]
            for token in np.random.default_rng(room).integers(0, 400, 60).tolist():
                engine.step(token, kv_cache)
            hits, misses, guessed = (engine.cache.place_stats - before)[:, [0, 1, 5]].T
            assert (misses[:NUM_HASHED] == 0).all(), room
            assert (hits + misses + guessed == 60 * TOP_K).all()
            assert guessed[:NUM_HASHED].sum() == engine.cache.foreseen[0] - reads > 0
            assert (guessed[NUM_HASHED:] == 0).all() and (misses[NUM_HASHED:] > 0).all()


@needs_core
def test_a_prompt_reads_ahead_too(path):
    with Engine.from_pretrained(path, context=CONTEXT, prefetch="none") as engine:
        resize(engine, 40)
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        ids = PROMPT[:3]
        engine.forward(ids, kv_cache, "all")
        hits, misses, guessed = engine.cache.place_stats[:, [0, 1, 5]].T
        wanted = [len(np.unique(expected_ids(layer, ids))) for layer in range(NUM_HASHED)]
        assert guessed[:NUM_HASHED].tolist() == wanted
        assert misses[:NUM_HASHED].tolist() == [0] * NUM_HASHED and misses[-1] > 0


@needs_core
def test_no_predictor_guesses_what_is_known(path):
    with Engine.from_pretrained(path, context=CONTEXT) as engine:
        engine.prefetch.close()
        prefetch = Prefetcher("router", NUM_LAYERS, depth=2, is_forced=True)
        engine.use_prefetch(prefetch)
        resize(engine, 10)
        engine.take_step_stats()
        greedy(engine, 60)
        stats, step = prefetch.stats(), engine.take_step_stats()
        assert stats.num_guesses > 0  # of the layers behind
        known = engine.cache.foreseen[0]
        assert known > 0 and step.guessed == stats.num_in_time + stats.num_late + known
        prefetch.close()


@needs_core
def test_recorded_routes_are_as_certain_as_the_table(path):
    """Replay puts other experts in the place of the table's: those are read ahead."""
    with Engine.from_pretrained(path, context=CONTEXT, prefetch="none") as engine:
        resize(engine, 8)
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        engine.forward(PROMPT, kv_cache)
        before, rng = engine.cache.place_stats.copy(), np.random.default_rng(1)
        for _ in range(30):
            draw = [np.sort(rng.choice(NUM_EXPERTS, TOP_K, replace=False)) for _ in range(5)]
            weights = np.full((NUM_LAYERS, TOP_K), 0.5)
            engine.forward([7], kv_cache, forced=(np.array(draw), weights))
        misses = (engine.cache.place_stats - before)[:, 1]
        assert (misses[:NUM_HASHED] == 0).all() and (misses[NUM_HASHED:] > 0).all()


@needs_core
def test_a_damaged_record_is_named_and_nothing_stays_held(tmp_path):
    path = make_store(tmp_path)
    with Store(path) as store:
        record = store.index.records[1, 3]
    with open(path / "experts.safetensors", "r+b") as file:
        file.seek(record.offset + 100)
        good = file.read(6)
        file.seek(record.offset + 100)
        file.write(b"damage")
    token = int(np.flatnonzero((random_table(1).numpy() == 3).any(axis=1))[0])
    with Engine.from_pretrained(path, context=CONTEXT, warm_start="off") as engine:
        kv_cache = KVCache.for_model(engine.args, engine.context, 16)
        for ids in ([token], [token, token]):  # one token; a prompt
            with pytest.raises(RecordError, match=r"layers\.1\.experts\.3"):
                engine.forward(ids, kv_cache)
            assert engine.cache.pinned_bytes == 0 and kv_cache.offset == 0
        with open(path / "experts.safetensors", "r+b") as file:
            file.seek(record.offset + 100)
            file.write(good)
        assert np.isfinite(engine.forward([token], kv_cache)).all()


@needs_core
def test_rules_that_compute_less_foresee_nothing_and_choose_from_the_table(path):
    from edgemoe.models.rules import Rule

    rule = Rule(active_experts=1)
    seen = {}
    for backend in ("native", "reference"):
        with Engine.from_pretrained(path, context=CONTEXT, backend=backend) as engine:
            engine._model.set_rule(rule)
            seen[backend] = run(engine, PROMPT, num_tokens=3)[1]
            assert getattr(engine.cache, "foreseen", (0, 0))[0] == 0
    for (layer, ids, _), (_, other, _) in zip(seen["native"], seen["reference"], strict=True):
        assert (ids[:, 1:] == -1).all()
        if layer == 0:
            assert np.array_equal(ids, other)


# ---- what cannot be -----------------------------------------------------------------------------


def _set(layer, row, values):
    def change(weights):
        weights[table_name(layer)][row] = torch.tensor(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(1, 7, [3, 8]), "token 7 goes to [3, 8]"),
        (_set(2, 0, [-1, 2]), "token 0 goes to [-1, 2]"),
        (_set(0, 415, [4, 4]), "token 415 goes to [4, 4]"),
        (lambda w: w.pop(table_name(1)), "is missing"),
        (lambda w: w.update({table_name(0): w[table_name(0)][:-1].clone()}), "has shape"),
        (lambda w: w.update({table_name(0): w[table_name(0)].float()}), "dtype `F32`"),
    ],
)
def test_a_malformed_table_is_refused_before_anything_is_written(tmp_path, change, message):
    source = make_source(tmp_path, change=change)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out.edgemoe", ConvertOptions(bits=4, group_size=32))
    assert message in caught.value.what + caught.value.why
    assert not list(tmp_path.glob("out*"))


def test_a_table_that_was_damaged_in_a_store_is_refused(tmp_path):
    path = make_store(tmp_path)
    with Store(path) as store:
        offset = store.trunk_entry(table_name(2)).offset
    with open(path / "trunk.safetensors", "r+b") as file:
        file.seek(offset)
        file.write(np.array([2, 2], dtype=np.int32).tobytes())
    with pytest.raises(FormatError, match="cannot be routed by"):
        Engine.from_pretrained(path, context=CONTEXT).close()


def test_a_hash_routed_layer_must_have_experts(path):
    config = Store(path).index.config | {"model_type": "qwen2_moe"}
    config |= {"mlp_only_layers": [1], "decoder_sparse_step": 1, "use_sliding_window": False}
    config |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    config |= {"norm_topk_prob": True}
    with pytest.raises(UnsupportedModelError, match="no experts"):
        parse_config(config)
    args = parse_config(config | {"num_hash_layers": 1})
    assert args == replace(args, hash_layers=(0,))
