"""Memory that is planned for prompts, keys and values, and chat templates holds experts while it is
not in use, and is given back before it is."""

import json
import mmap
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemoe.config import EngineConfig
from edgemoe.engine import DEMO, Engine
from edgemoe.kv_cache import KVCache
from edgemoe.preflight import dims_of, line_bytes, preflight
from edgemoe.runtime import core
from edgemoe.runtime.buffers import prompt_buffers
from edgemoe.runtime.memory import Arena

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


@pytest.mark.parametrize("check", ["lending", "changes_of_size", "contexts 16", "contexts 8"])
def test_the_cache_has_what_no_step_needs(check: str):
    """In a process of its own: what other tests hold would be part of the plan."""
    result = subprocess.run(
        [sys.executable, __file__, *check.split()], capture_output=True, text=True
    )
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
                    second.logits(PROMPT[:70])
                    ends.append(engine.cache.capacity_bytes)
                    check_buffers(engine)
                    first.logits(PROMPT[50:90])
                    check_buffers(engine)
                first.logits(PROMPT[90:100])
                ends.append(engine.cache.capacity_bytes)
                check_buffers(engine)
        assert ends[:2] == ends[2:] and ends[0] != ends[1]
        engine.lent_memory.end_template()
        kv_cache = KVCache.for_model(engine.args, CONTEXT, 16)
        engine.forward(PROMPT, kv_cache)
        check_buffers(engine)


def check_lending() -> None:
    with open_engine() as engine:
        cache, lent, dims = engine.cache, engine.lent_memory, dims_of(engine.args)
        buffers = {n: sum(prompt_buffers(dims, engine._index, n, 512)) for n in (9, 200, CONTEXT)}
        kv_cache = KVCache.for_model(engine.args, CONTEXT, 16)
        engine.forward([9], kv_cache)
        kv_cache.trim(0)
        without = cache.capacity_bytes - buffers[CONTEXT]
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
        assert seen == [
            whole - buffers[200],
            whole,
            whole - buffers[9],
            whole,
            whole - buffers[200],
        ]
        assert lent.lent_bytes + engine.plan.cache_bytes == cache.capacity_bytes
        lent.end_template()
        assert cache.capacity_bytes == engine.plan.cache_bytes + whole
        assert engine.report()["lent_bytes"] == whole
        streamed = rows(engine)
    with Engine.from_pretrained(DEMO, context=CONTEXT) as engine:
        for found, expected in zip(streamed, rows(engine), strict=True):
            np.testing.assert_array_equal(found, expected)


@contextmanager
def open_long_demo(kv_bits: int, spare_bytes: int | None = None) -> Iterator[Engine]:
    """The demo model, said to know longer contexts, with keys and values of 5 or 6 MiB."""
    context = 1024 if kv_bits == 16 else 1536
    options = {"context": context, "kv_bits": kv_bits, "warm_start": "off"}
    with tempfile.TemporaryDirectory() as folder:
        for path in DEMO.iterdir():
            Path(folder, path.name).symlink_to(path)
        config = json.loads((DEMO / "config.json").read_text())
        Path(folder, "config.json").unlink()
        text = json.dumps(config | {"max_position_embeddings": context})
        Path(folder, "config.json").write_text(text)
        if spare_bytes is not None:
            floor = preflight(Path(folder), EngineConfig.make(**options)).plan.floor_bytes
            options["memory"] = floor + spare_bytes
        with Engine.from_pretrained(folder, **options) as engine:
            yield engine


def present_bytes(arena: Arena) -> int:
    """Of its pages, those that are in memory."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(arena.address // mmap.PAGESIZE * 8)
        pages = np.frombuffer(file.read(-(-arena.num_bytes // mmap.PAGESIZE) * 8), dtype=np.uint64)
    return int((pages >> np.uint64(63)).sum()) * mmap.PAGESIZE


def contexts(engine: Engine, sizes: list[int], is_whole: bool = False) -> list[np.ndarray]:
    """A context grows to its end, then one beside it; the first is begun anew. `sizes` is given the
    bytes of the expert cache after each. `is_whole`: both are laid out for all tokens at once."""
    text, found = [(7 * i) % 3000 + 5 for i in range(engine.context + 100)], []
    with engine.session() as first, engine.session() as second:
        for session in (first, second):
            assert session._kv_cache.room < engine.context
            if is_whole:
                session._kv_cache.resize(engine.context)
        steps = [(first, 0, end) for end in (300, 301, 341, 700, 701, engine.context)]
        steps += [(second, 100, 130), (first, 50, 90), (second, 100, 700), (first, 50, 500)]
        for session, begin, end in steps:
            found.append(session.logits(text[begin:end]))
            if session.offset < engine.context:
                found.append(session.step(9)[0].copy())
            sizes.append(engine.cache.capacity_bytes)
    return found


def check_contexts(kv_bits: str) -> None:
    """At no time are more pages in memory than planned, and the cache has what tokens have not."""
    with open_long_demo(int(kv_bits), spare_bytes=7 << 20) as engine:
        engine.lent_memory.end_template()
        kv_bytes = line_bytes(engine.plan, "KV cache")
        plan, cache, sizes, resize = engine.plan, engine.cache, [], KVCache.resize
        buffers = prompt_buffers(dims_of(engine.args), engine._index, plan.chunk, plan.chunk)
        most_bytes = plan.cache_bytes + sum(buffers) + kv_bytes
        assert most_bytes < plan.max_cache_bytes  # else more is planned than can be used
        seen = []

        def look(kv_cache: KVCache, *args: Any) -> None:
            if args:
                resize(kv_cache, *args)
            others = [vars(each).get("_kv_cache") for each in engine._kv_lending._sessions]
            arenas = {each._arena for each in (kv_cache, *others) if each is not None}
            seen.append(sum(map(present_bytes, arenas | {cache._arena})))
            assert seen[-1] <= most_bytes

        KVCache.resize = look
        forward, step = engine._model.forward, engine._model.step

        def looking(function: Callable) -> Callable:
            def run(token_ids: Any, kv_cache: KVCache, *args: Any, **options: Any) -> Any:
                result = function(token_ids, kv_cache, *args, **options)
                look(kv_cache)
                return result

            return run

        engine._model.forward, engine._model.step = looking(forward), looking(step)
        streamed = contexts(engine, sizes)
    assert max(seen) > most_bytes - (3 << 20)  # two huge pages may be used in part
    # Of the cache when 301 tokens are stored, and all; when another has 30, and the first 41 again.
    assert min(sizes[0] - sizes[5], sizes[7] - sizes[6]) > kv_bytes // 2
    KVCache.resize = resize
    with open_long_demo(int(kv_bits)) as engine:
        expected = contexts(engine, [], is_whole=True)
        grown = contexts(engine, [])
    for *found, wanted in zip(streamed, grown, expected, strict=True):
        for each in found:
            np.testing.assert_array_equal(each, wanted)


if __name__ == "__main__":
    checks = {
        "lending": check_lending,
        "changes_of_size": check_changes_of_size,
        "contexts": check_contexts,
    }
    checks[sys.argv[1]](*sys.argv[2:])
