"""What is promised of memory and of reads: the process stays under its number, and a prompt reads
each expert once (EdgeMoE, arXiv 2308.14352: the expert buffer is what the budget leaves)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stores_small

from edgemoe.engine import DEMO, Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime.index import load_index

ROOT = Path(__file__).resolve().parent.parent

# One process for all budgets, ascending: the kernel's peak is set back between them.
RESIDENCY = """
import json, sys
from edgemoe import Engine
from edgemoe.cli.bench_memory import PeakMemory
from edgemoe.preflight import line_bytes
path, found = sys.argv[1], []
with Engine.from_pretrained(path, context=128) as engine:
    record, every = engine._index.max_record_bytes, engine._index.expert_bytes
    least, floor = engine.plan.min_cache_bytes, engine.plan.floor_bytes
for cache_bytes in (least, 2 * least, every // 4, every // 2, every):
    with PeakMemory([]) as peak:
        with Engine.from_pretrained(
            path, context=128, memory=floor - least + cache_bytes, cache_bytes=cache_bytes
        ) as engine:
            engine.generate([5, 6, 7, 8] * 16, max_tokens=32)
            held, plan = engine.cache.resident_bytes, engine.plan
            lines = {line.name: line.num_bytes for line in plan.lines}
            asked = engine.cache.capacity_bytes
    others = sum(n for name, n in lines.items() if name not in ("expert cache", "unused"))
    found.append([peak.rss_bytes, others, asked, held, cache_bytes, plan.budget_bytes])
print(json.dumps([record, least, every, found]))
"""


def test_the_peak_is_the_trunk_the_slots_and_what_is_declared() -> None:
    """Slots of one layer's experts (k), of two, of a quarter and a half, and of all."""
    command = [sys.executable, "-c", RESIDENCY, str(DEMO)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    record, least, every, found = json.loads(result.stdout)
    assert least // record == 4  # the demo model's k
    for peak, others, capacity, held, asked, budget in found:
        assert held <= capacity == asked // 4096 * 4096
        assert peak <= others + capacity, (peak, others, capacity)
        assert peak <= budget
    assert found[0][3] == 4 * record and found[-1][2] == every


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores_small.make_store(tmp_path_factory.mktemp("residency"))


@pytest.mark.parametrize("records", [2, 3, 24])
def test_a_prompt_reads_each_expert_at_most_once(store: Path, records: int) -> None:
    """Also where a chunk needs more experts than there are slots."""
    rng = np.random.default_rng(8)
    size = load_index(store).max_record_bytes
    with Engine.from_pretrained(store, context=512, cache_bytes=records * size) as engine:
        kv_cache = KVCache.for_model(engine.args, 512, 16)
        chosen: set[tuple[int, int]] = set()

        def note(layer, expert_ids, _weights):
            chosen.update((layer, expert) for expert in np.unique(expert_ids).tolist())

        before = engine.reader.stats()["num_reads"]
        tokens = rng.integers(0, 400, 200).tolist()
        engine.forward(tokens, kv_cache, on_route=note)
        num_reads = engine.reader.stats()["num_reads"] - before
        assert len(chosen) > records or records == 24
        assert num_reads == len(chosen)
        assert engine.take_step_stats().misses == num_reads
