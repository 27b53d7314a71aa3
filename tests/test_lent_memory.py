"""Memory that is planned for prompts and chat templates holds experts while it is not in use."""

import subprocess
import sys

import numpy as np
import pytest

from edgemoe.config import EngineConfig
from edgemoe.engine import DEMO, Engine
from edgemoe.kv_cache import KVCache
from edgemoe.preflight import dims_of, preflight
from edgemoe.runtime import core
from edgemoe.runtime.buffers import prompt_buffers

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")
CONTEXT = 256
PROMPT = [(7 * i) % 500 + 5 for i in range(200)]


def rows(engine: Engine) -> list[np.ndarray]:
    """Logits of a prompt, tokens, a short prompt and tokens again."""
    kv_cache = KVCache.for_model(engine.args, CONTEXT, 16)
    found = [engine.forward(PROMPT, kv_cache)]
    found += [engine.step(token, kv_cache)[0].copy() for token in (9, 10, 11)]
    found.append(engine.forward(PROMPT[:9], kv_cache))
    found += [engine.step(token, kv_cache)[0].copy() for token in (12, 13)]
    return found


@pytest.mark.parametrize("check", ["lending", "changes_of_size"])
def test_the_cache_has_what_no_step_needs(check: str):
    """In a process of its own: what other tests hold would be part of the plan."""
    result = subprocess.run([sys.executable, __file__, check], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def check_buffers(engine: Engine) -> None:
    """They begin where the cache ends: what lay between would be held, and used by neither."""
    cache = engine.cache
    assert engine._executor._args.workspace == cache._arena.address + cache.capacity_bytes


def open_engine(spare_bytes: int = 0) -> Engine:
    floor = preflight(DEMO, EngineConfig.make(context=CONTEXT)).plan.floor_bytes
    memory = floor + spare_bytes
    return Engine.from_pretrained(DEMO, context=CONTEXT, memory=memory, warm_start="off")


def check_changes_of_size() -> None:
    """A second session takes memory from the cache and gives it back, also between a prompt and its
    answer; then the process that renders templates takes some for good."""
    with open_engine(spare_bytes=8 << 20) as engine:
        ends = []
        with engine.session() as first:
            first.logits(PROMPT[:50])
            for _ in range(2):
                with engine.session() as second:
                    ends.append(engine.cache.capacity_bytes)
                    second.logits(PROMPT[:70])
                    check_buffers(engine)
                    first.logits(PROMPT[50:90])
                    check_buffers(engine)
                first.logits(PROMPT[90:100])
                ends.append(engine.cache.capacity_bytes)
                check_buffers(engine)
        assert ends[:2] == ends[2:] and ends[0] != ends[1]
        engine.lent_memory.end_idle()
        kv_cache = KVCache.for_model(engine.args, CONTEXT, 16)
        engine.forward(PROMPT, kv_cache)
        check_buffers(engine)


def check_lending() -> None:
    with open_engine() as engine:
        cache, lent, dims = engine.cache, engine.lent_memory, dims_of(engine.args)
        buffers = {n: sum(prompt_buffers(dims, engine._index, n, 512)) for n in (9, 200, CONTEXT)}
        kv_cache = KVCache.for_model(engine.args, CONTEXT, 16)
        without = cache.capacity_bytes
        assert engine.plan.cache_bytes < without <= engine.plan.max_cache_bytes
        seen = []
        for tokens in (PROMPT, [9], PROMPT[:9], [10], PROMPT):
            engine.forward(tokens, kv_cache)
            assert cache.resident_bytes <= cache.capacity_bytes
            seen.append(cache.capacity_bytes - without)
            if len(tokens) > 1:
                check_buffers(engine)
            if len(tokens) > 100:
                kv_cache.trim(0)
        whole = buffers[CONTEXT]
        assert seen == [0, whole, whole - buffers[9], whole, whole - buffers[200]]
        assert lent.lent_bytes + engine.plan.cache_bytes == cache.capacity_bytes
        lent.end_idle()
        assert cache.capacity_bytes == engine.plan.cache_bytes + whole
        streamed = rows(engine)
    with Engine.from_pretrained(DEMO, context=CONTEXT) as engine:
        for found, expected in zip(streamed, rows(engine), strict=True):
            np.testing.assert_array_equal(found, expected)


if __name__ == "__main__":
    {"lending": check_lending, "changes_of_size": check_changes_of_size}[sys.argv[1]]()
