"""The pipeline of the EdgeMoE paper (arXiv 2308.14352, section 4.3) with a compute time and a drive
that are both given: on the emulated drive's own clock, then through the real engine, where bytes
and their order are asserted and no time is."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from stores_small import make_store

from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime import core
from edgemoe.runtime.predictors import noisy_oracle
from edgemoe.runtime.prefetch import GIVEN, Prefetcher
from edgemoe.runtime.throttle import NEVER, Throttle

MS = 1_000_000
RATE = 1_000_000  # bytes per second: 1000 bytes take a millisecond
CHUNK = 1000
LAYERS = 12


def decode(
    compute: int, record: int, guess: Callable[[int], Sequence[int]], picks: int = 2
) -> tuple[int, int]:
    """(time, bytes read) of LAYERS layers of `picks` records each, nothing resident at first.

    As the engine does it: guesses in chunks while the layer before is computed, one at a time so
    that a demand waits for no more than one; those that were wrong are dropped, with what was not
    yet asked for, when the router has spoken.
    """
    drive, now, tag = Throttle(rate=RATE), 0, 0
    chunks = record // CHUNK
    landed: dict[int, int] = {}  # record -> chunks that are there
    num_bytes = 0

    def finish(wanted: int) -> None:
        nonlocal now
        while not drive.take(now, wanted):
            now = drive.due()

    for layer in range(LAYERS):
        for key in range(layer * picks, (layer + 1) * picks):
            missing = chunks - landed.pop(key, 0)
            if not missing:
                continue
            tag += 1
            drive.add(tag, key, 0, missing * CHUNK, now)
            num_bytes += missing * CHUNK
            finish(tag)
        landed.clear()
        end = now + compute
        at = drive.due() if drive.due() != NEVER else now
        for key in guess(layer):
            while landed.get(key, 0) < chunks and at < end:
                tag += 1
                drive.add(tag, key, 1, CHUNK, at)
                num_bytes += CHUNK
                at = drive.due()
                landed[key] = landed.get(key, 0) + 1
        now = end
    while drive.due() != NEVER:
        now = max(now, drive.due())
        drive.take(now, 0)
    return now, num_bytes


def perfect(layer: int) -> Sequence[int]:
    return range((layer + 1) * 2, (layer + 2) * 2) if layer + 1 < LAYERS else ()


def wrong(layer: int) -> Sequence[int]:
    return range(1000 + layer * 2, 1002 + layer * 2)


@pytest.mark.parametrize("compute", [2 * MS, 7 * MS, 20 * MS, 33 * MS, 80 * MS])
def test_a_perfect_predictor_takes_the_longer_of_reading_and_computing(compute: int) -> None:
    record = 10 * CHUNK
    read = 2 * 10 * MS
    total, num_bytes = decode(compute, record, perfect)
    ideal = read + (LAYERS - 1) * max(compute, read) + compute
    assert num_bytes == LAYERS * 2 * record
    # A layer's last chunk may end after its router has spoken.
    assert ideal <= total <= ideal + LAYERS * MS
    on_demand, _ = decode(compute, record, lambda layer: ())
    assert on_demand == LAYERS * (read + compute) > total


@pytest.mark.parametrize("compute", [2 * MS, 7 * MS + 300_000, 20 * MS, 80 * MS])
def test_an_always_wrong_predictor_costs_a_layer_one_chunk_at_most(compute: int) -> None:
    record = 10 * CHUNK
    total, _ = decode(compute, record, wrong)
    on_demand, _ = decode(compute, record, lambda layer: ())
    assert on_demand <= total <= on_demand + LAYERS * MS


# ---- the engine ---------------------------------------------------------------------------------

PLACES, NUM_EXPERTS, TOKENS = 3, 8, 40
OPTIONS = {"context": 64, "policy": "lru", "throttle": "20MB/s", "warm_start": "off"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("pipeline"))
    with Engine.from_pretrained(path, **OPTIONS) as engine:
        yield engine


def run(engine: Engine, routes: np.ndarray | None, right: float | None) -> dict[str, Any]:
    """Decode with room for two layers: what was read as demand and as guesses, and the routes."""
    size = engine._index.max_record_bytes
    engine.cache.trim(0)
    engine.cache.trim(4 * size)
    guesses, prefetch = None, Prefetcher("none", PLACES)
    if right is not None:
        guesses = noisy_oracle(routes, [NUM_EXPERTS] * PLACES, right)
        prefetch = Prefetcher(GIVEN, PLACES, depth=1, is_forced=True)
    engine.use_prefetch(prefetch)
    kv_cache = KVCache.for_model(engine.args, 64, 16)
    engine.take_step_stats()
    before = engine.reader.stats()
    seen: list[np.ndarray] = []
    for at in range(TOKENS):
        options = {} if guesses is None else {"guesses": guesses[at]}
        options["on_route"] = lambda layer, ids, weights: seen.append(ids[0])
        engine.forward([at + 5], kv_cache, **options)
    step, after = engine.take_step_stats(), engine.reader.stats()
    demand, *guessed = np.subtract(after["priority_bytes"], before["priority_bytes"]).tolist()
    busy_s = after["throttle_busy_s"] - before["throttle_busy_s"]
    under_way = 4 * size  # guesses that a run leaves behind: served in part, not yet counted
    assert busy_s == pytest.approx((demand + sum(guessed)) / 20e6, abs=under_way / 20e6)
    return {
        "demand": demand,
        "guessed": sum(guessed),
        "misses": step.misses,
        "wanted": step.hits + step.misses + step.guessed,
        "routes": np.array(seen).reshape(TOKENS, PLACES, -1),
    }


@pytest.mark.skipif(core.lib is None, reason="native core not built")
def test_the_engine_reads_no_more_for_perfect_guesses_and_no_less_for_wrong_ones(engine) -> None:
    plain = run(engine, None, None)
    # Less room than a token's cycle: the least recently used is always what is wanted next.
    assert plain["guessed"] == 0 and plain["misses"] == plain["wanted"] == TOKENS * PLACES * 2
    right = run(engine, plain["routes"], 1.0)
    # Every guess is wanted: the drive serves what it would have served, only earlier.
    assert right["guessed"] > 0
    assert right["demand"] + right["guessed"] <= plain["demand"]
    assert right["misses"] < plain["misses"] / 4
    lost = run(engine, plain["routes"], 0.0)
    assert lost["wanted"] == plain["wanted"]
    assert np.array_equal(lost["routes"], plain["routes"])
    # A wrong guess may serve a later token; what is demanded does not grow.
    assert lost["demand"] <= plain["demand"] and lost["guessed"] > 0
