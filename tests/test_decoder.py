"""The native decoder: bits that depend on nothing but the text, and what happens when it fails."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from stores_small import make_store

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.models.native import NativeLayers
from edgemoe.runtime import core
from edgemoe.runtime.errors import BudgetError, RecordError
from edgemoe.runtime.kernels import PackedMatrix
from edgemoe.runtime.packing import BF16, to_bf16

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")

PROMPT = np.random.default_rng(5).integers(0, 400, 30).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def engine(path):
    with Engine.from_pretrained(path, context=64) as engine:
        yield engine


def kv_cache_of(engine: Engine, kv_bits: int = 16) -> KVCache:
    return KVCache.for_model(engine.args, engine.context, kv_bits)


def logits_of(engine: Engine, pieces: list[int], kv_bits: int = 16) -> np.ndarray:
    """Logits of every token of PROMPT, which goes in pieces of these lengths."""
    kv_cache, rows, begin = kv_cache_of(engine, kv_bits), [], 0
    for length in pieces:
        rows.append(engine.forward(PROMPT[begin : begin + length], kv_cache, "all"))
        begin += length
    return np.concatenate(rows)


ISA_PROGRAM = """
import sys, zlib
sys.path.insert(0, sys.argv[1])
from edgemoe.engine import Engine
from edgemoe.runtime import core
from test_decoder import logits_of
with Engine.from_pretrained(sys.argv[2], context=64, threads=1) as engine:
    sums = [
        zlib.crc32(logits_of(engine, pieces, bits).tobytes())
        for bits in (8, 16, 32) for pieces in ([30], [20] + [1] * 10)
    ]
print(core.lib.em_isa().decode(), *sums)
"""


def test_instruction_sets_agree(path):
    """Every level that this machine has gives the same logits."""
    results = {}
    for isa in ("scalar", "avx2", "avxvnni", "avx512vnni", "amx"):
        answer = subprocess.run(
            [sys.executable, "-c", ISA_PROGRAM, os.path.dirname(__file__), str(path)],
            env={**os.environ, "EDGEMOE_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        used, *sums = answer.stdout.split()
        assert sums[0] == sums[1] and sums[2] == sums[3] and sums[4] == sums[5]
        results[used] = sums
    assert "scalar" in results
    assert len({tuple(sums) for sums in results.values()}) == 1, results.keys()


@pytest.mark.parametrize("kv_bits", [8, 16, 32])
def test_a_streamed_token_has_the_bits_of_a_resident_one(kv_bits, path):
    """With room for one layer's records, every layer of every token demands what is absent."""
    with Engine.from_pretrained(path, context=64) as engine:
        expected = logits_of(engine, [10] + [1] * 20, kv_bits)
        largest = max(record.num_bytes for record in engine._index.records.values())
        engine.cache.trim(engine.args.top_k * largest)
        engine.take_step_stats()
        assert np.array_equal(logits_of(engine, [10] + [1] * 20, kv_bits), expected)
        stats = engine.take_step_stats()
        assert stats.misses > 20 and stats.native_s > stats.submit_s > 0
        assert stats.decide_s > 0
        assert engine.cache.pinned_bytes == 0


def test_a_token_without_room_for_its_records_is_refused(engine):
    expected = logits_of(engine, [29, 1])
    kv_cache, capacity = kv_cache_of(engine), engine.cache.capacity_bytes
    engine.forward(PROMPT[:29], kv_cache)
    engine.cache.trim(engine._index.max_record_bytes)
    with pytest.raises(BudgetError, match="do not fit into the expert cache"):
        engine.forward(PROMPT[29:], kv_cache)
    assert kv_cache.offset == 29 and engine.cache.pinned_bytes == 0
    engine.cache.trim(capacity)
    assert np.array_equal(engine.forward(PROMPT[29:], kv_cache)[0], expected[29])


def test_a_token_that_was_stopped_for_nothing_begins_anew(engine):
    """The handler of a signal may return: then the token is wanted all the same."""
    expected = logits_of(engine, [29, 1])
    kv_cache = kv_cache_of(engine)
    engine.forward(PROMPT[:29], kv_cache)
    engine._model._layers._stop.value = 1
    assert np.array_equal(engine.forward(PROMPT[29:], kv_cache)[0], expected[29])
    assert engine._model._layers._stop.value == 0


def test_a_damaged_record_is_named_and_the_token_can_be_repeated(tmp_path):
    path = make_store(tmp_path)
    with Engine.from_pretrained(path, context=64) as engine:
        kv_cache, seen = kv_cache_of(engine), []
        engine.forward(PROMPT[:29], kv_cache)
        expected = engine._model.forward(
            PROMPT[29:], kv_cache, on_route=lambda *routing: seen.append(routing)
        )
        kv_cache.trim(29)
        layer, ids, _ = seen[1]
        expert = int(ids[0, 0])
        record = engine._index.records[layer, expert]
        with open(path / "experts.safetensors", "r+b") as file:
            file.seek(record.offset + 100)
            good = file.read(6)
            file.seek(record.offset + 100)
            file.write(b"damage")
    with Engine.from_pretrained(path, context=64, io="buffered") as engine:
        kv_cache = kv_cache_of(engine)
        with pytest.raises(RecordError, match=f"layers.{layer}.experts.{expert}"):
            for token in PROMPT:
                engine.forward([token], kv_cache)
        assert engine.cache.pinned_bytes == 0
        offset = kv_cache.offset
        with open(path / "experts.safetensors", "r+b") as file:
            file.seek(record.offset + 100)
            file.write(good)
        for token in PROMPT[offset:]:
            logits = engine.forward([token], kv_cache)
        assert np.array_equal(logits, expected)


def test_equal_scores_go_to_the_lowest_ids(engine):
    """A router of zeros: every expert is as likely as any other."""
    layers, *rest = engine._model._layers._weights
    zeros = PackedMatrix.from_16bit(np.zeros((8, 64), dtype=BF16))
    native = NativeLayers(
        engine.args,
        [replace(layer, router=zeros) for layer in layers],
        *rest,
        engine._executor,
        None,
    )
    kv_cache, seen = kv_cache_of(engine), []
    native.run(np.array(PROMPT[:3]), kv_cache, lambda *routing: seen.append(routing))
    native.decode(PROMPT[3], kv_cache, lambda *routing: seen.append(routing))
    assert len(seen) == 6
    for _, ids, weights in seen:
        assert (ids == np.array([0, 1])).all() and (weights == 0.125).all()


def test_scores_that_are_not_numbers_give_experts_that_exist(engine):
    layers, *rest = engine._model._layers._weights
    bad = PackedMatrix.from_16bit(to_bf16(np.full((8, 64), np.nan)))
    native = NativeLayers(
        engine.args,
        [replace(layer, router=bad) for layer in layers],
        *rest,
        engine._executor,
        None,
    )
    seen = []
    logits = native.decode(PROMPT[0], kv_cache_of(engine), lambda *routing: seen.append(routing))
    assert seen[0][1].tolist() == [[0, 1]] and np.isnan(logits).all()


def test_sizes_that_do_not_go_together_are_refused(engine):
    layers, *rest = engine._model._layers._weights
    wrong = PackedMatrix.from_16bit(np.zeros((8, 32), dtype=BF16))
    for change in ({"router": wrong}, {"q_norm": None}, {"output": wrong}, {"down": wrong}):
        changed = [*layers[:-1], replace(layers[-1], **change)]
        native = NativeLayers(engine.args, changed, *rest, engine._executor, None)
        with pytest.raises(Exception, match="the core refused the sizes"):
            native.decode(1, kv_cache_of(engine), None)


def test_the_report_says_what_runs_the_layers(path, engine):
    assert engine.report()["decode"] == "native"
    with Engine.from_pretrained(path, context=64, backend="reference") as slow:
        assert slow.report()["decode"] == "reference"
        assert slow.take_step_stats().native_s == 0
