"""One run of one arm of `bench --sets`: given tokens, so that every arm gets the same."""

import argparse
import gc
import hashlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..runtime.index import EXPERTS_FILE, TRUNK_FILE
from .bench_memory import PeakMemory
from .sets_arms import Arm

if TYPE_CHECKING:
    from ..engine import Engine

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Budget:
    """The same for every arm: `memory_bytes` of the process, else `cache_bytes` of expert cache."""

    memory_bytes: int | None
    cache_bytes: int

    @property
    def options(self) -> dict[str, int]:
        if self.memory_bytes is not None:
            return {"memory": self.memory_bytes}
        return {"cache_bytes": self.cache_bytes}


def engine_options(context: int, args: argparse.Namespace) -> dict[str, Any]:
    """What all engines of the report are opened with."""
    return {
        "context": context,
        "policy": args.policy,
        "prefetch": args.prefetch or "none",  # so that what is read is what was demanded
        "threads": args.threads,
        "backend": args.backend,
        "kv_bits": args.kv_bits,
        "io": args.io,
        "warm_start": "off",
    }


def run_arm(
    arm: Arm, budget: Budget, tokens: list[int], num_prompt: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Decode what follows the prompt in `tokens`, one given token at a time; then the prompt once
    more with nothing in memory, which is the time to the first token."""
    from ..engine import Engine
    from ..preflight import release_free_memory

    gc.collect()
    release_free_memory()
    options = engine_options(len(tokens), args) | budget.options | arm.options
    with PeakMemory([arm.path / EXPERTS_FILE, arm.path / TRUNK_FILE]) as peak:
        with Engine.from_pretrained(arm.path, throttle=args.throttle, **options) as engine:
            cache_bytes = engine.cache.capacity_bytes
            routing = engine.routing
            result = _decode(engine, tokens, num_prompt)
    return result | {
        "expert_cache_bytes": cache_bytes,
        "routing": routing.label if routing else None,
        "peak_rss_bytes": peak.rss_bytes,
    }


def control(arm: Arm, tokens: list[int], num_prompt: int, args: argparse.Namespace) -> float:
    """Seconds a token of the arm's store, every expert in memory and in use, by its own routes."""
    from ..engine import Engine

    options = engine_options(len(tokens), args) | {"routing": arm.routing}
    with Engine.from_pretrained(arm.path, **options) as engine:
        engine.cache.preload()
        return 1 / _decode(engine, tokens, num_prompt)["decode_tokens_per_s"]


def _decode(engine: "Engine", tokens: list[int], num_prompt: int) -> dict[str, Any]:
    from ..session import Session

    prompt, following = tokens[:num_prompt], tokens[num_prompt:]
    warm_up = min(WARM_UP_TOKENS, len(following) - 1)
    step_s, digest = [], hashlib.sha256()
    with Session(engine) as session:
        session.logits(prompt)
        for token in following[:warm_up]:
            session.step(token)
        engine.take_step_stats()
        for token in following[warm_up:]:
            begin = time.perf_counter()
            logits, _ = session.step(token)
            step_s.append(time.perf_counter() - begin)
            digest.update(logits)
        stats = engine.take_step_stats()
        held = engine.cache.capacity_bytes
        engine.cache.trim(0)
        engine.cache.trim(held)
        session.reset()
        begin = time.perf_counter()
        session.logits(prompt).argmax()
        ttft_s = time.perf_counter() - begin
    demand = stats.hits + stats.misses + stats.guessed
    return {
        "decode_tokens_per_s": len(step_s) / sum(step_s),
        "bytes_read_per_token": stats.bytes_read / len(step_s),
        "hit_rate": stats.hits / demand if demand else None,
        "stall_share": stats.stall_s / sum(step_s),
        "ttft_s": ttft_s,
        "output_hash": digest.hexdigest()[:16],
    }


def limiter(
    run: dict[str, Any], limits: dict[str, Any], touched: float, no_read_s: float | None
) -> dict[str, Any]:
    """What a token would take of each resource alone, in seconds, and which takes longest.

    Storage: bytes read; DRAM: bytes gone through, at rates measured around the round; compute: what
    a run without reads takes beyond its share of DRAM. None where there was no such run."""
    storage_s = run["bytes_read_per_token"] / limits["storage_bytes_per_s"]
    dram_s = touched / limits["dram_bytes_per_s"]
    alone = {"storage": storage_s, "DRAM": dram_s}
    if no_read_s is not None:
        alone["compute"] = max(0.0, no_read_s - dram_s)
    without_reads = no_read_s if no_read_s is not None else dram_s
    return {
        "alone_s": alone,
        "limiter": max(alone, key=lambda name: alone[name]),
        "bound_s": max(storage_s, without_reads),  # reads and the rest perfectly side by side
    }
