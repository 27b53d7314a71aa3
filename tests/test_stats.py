"""Statistics: the definitions and the footer."""

import json

from edgemoe.runtime.process import process_memory
from edgemoe.stats import GIB, GenerationStats, memory_bytes, peak_memory_bytes


def test_footer():
    stats = GenerationStats(
        prompt_tokens=100,
        cached_tokens=90,
        generated_tokens=412,
        ttft_s=0.9,
        prefill_s=0.5,
        decode_s=411 / 11.3,
        hits=81,
        misses=19,
        memory_bytes=int(4.9 * GIB),
        budget_bytes=6 * GIB,
    )
    assert stats.footer() == "412 tok · 11.3 tok/s · TTFT 0.9 s · hit 81 % · 4.9/6.0 GiB"
    assert abs(stats.tpot_s * stats.tokens_per_s - 1) < 1e-9
    assert stats.prefill_tokens_per_s == 20
    document = json.loads(json.dumps(stats.to_dict()))
    assert document["dispatch_s"] == 0  # nothing was said of the core
    assert GenerationStats(decode_s=2.0, native_s=1.5).dispatch_s == 0.5
    assert document["hit_rate"] == 0.81 and document["generated_tokens"] == 412


def test_what_is_not_known_is_left_out():
    assert GenerationStats(generated_tokens=1, memory_bytes=GIB).footer() == (
        "1 tok · TTFT 0.0 s · 1.0 GiB"
    )
    assert GenerationStats().hit_rate == 0 and GenerationStats().tokens_per_s == 0


def test_memory_is_that_of_the_process():
    assert memory_bytes() > 1 << 20
    assert peak_memory_bytes() >= process_memory().rss_bytes // 2
    assert memory_bytes(1 << 22) > 1 << 20  # a worker that has ended
