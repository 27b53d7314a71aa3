"""The measuring half of `bench`: arms, rounds, prompts, and what a row holds."""

import argparse
import gc
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import BudgetError, UsageError
from ..runtime.index import EXPERTS_FILE, TRUNK_FILE, StoreIndex, load_index
from .bench_limits import dram_bandwidth, machine, storage_bandwidth, touched_bytes
from .bench_memory import PeakMemory
from .decode import Decoded, greedy, text_tokens
from .plan import store_plan
from .render import note, one_line, output_hash

SCHEMA = 1
WARM_UP_TOKENS = 8
PROMPT_TOKENS = 512


@dataclass(slots=True)
class Arm:
    """One budget. `budget_bytes` of the floor moves with what the process already holds."""

    name: str
    budget_bytes: int


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every arm in every round; returns the JSON document.

    Raises BudgetError where no arm fits.
    """
    index = load_index(path)
    if args.prompt_tokens is None:
        args.prompt_tokens = _prompt_tokens(index, args)
    context = args.context or args.prompt_tokens + args.tokens
    if context < args.prompt_tokens + args.tokens:
        raise UsageError(
            f"--context {context} is too short",
            f"-p {args.prompt_tokens} and -n {args.tokens} need more",
        )
    plan = store_plan(index, None, context, args.kv_bits)
    arms = [_arm(word, plan) for word in args.memory]
    prompts, prompt_note = _prompts(path, index, args)
    rows: dict[str, dict[str, Any]] = {
        arm.name: {"arm": arm.name, "budget_bytes": arm.budget_bytes, "rounds": []} for arm in arms
    }
    limits, failure = [], None
    for turn, prompt in enumerate(prompts):
        note(f"round {turn + 1} of {len(prompts)}: what the machine can do")
        limits.append(_limits(index, args))
        for arm in arms:
            if "error" in rows[arm.name]:
                continue
            note(f"round {turn + 1} of {len(prompts)}: {arm.name}")
            try:
                result = _measure_one(path, arm, prompt, context, args)
            except BudgetError as error:
                failure = error
                rows[arm.name]["error"] = f"{error.what}; {error.next_step}"
                note(f"note: {arm.name}: {one_line(error.what)}")
                continue
            result |= _reached(result, limits[-1], index, args)
            rows[arm.name]["rounds"].append(result)
    if failure is not None and all("error" in row for row in rows.values()):
        raise failure
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "model": path.name.removesuffix(".edgemoe"),
        "experts_sha256": index.sha256.get(EXPERTS_FILE),
        "prompts": {"kind": args.prompts, "tokens": args.prompt_tokens, "note": prompt_note},
        "decoded_tokens": args.tokens,
        "context": context,
        "policy": args.policy,
        "full_residence_bytes": plan.resident_budget_bytes,
        "floor_bytes": plan.floor_bytes,
        "limits": limits,
        "rows": list(rows.values()),
    }


def _prompt_tokens(index: StoreIndex, args: argparse.Namespace) -> int:
    """The usual length of a prompt, or what the context leaves beside the decoded tokens."""
    from ..models import parse_config

    room = (args.context or parse_config(index.config).max_context) - args.tokens
    return min(PROMPT_TOKENS, room) if room > 0 else PROMPT_TOKENS  # what is refused below


def _arm(word: str, plan: Any) -> Arm:
    """`floor`, a percentage of full residence, or a size."""
    from ..runtime.amounts import parse_bytes

    if word == "floor":
        return Arm(word, plan.floor_bytes)
    if word.endswith("%"):
        try:
            share = float(word[:-1])
        except ValueError:
            share = 0.0
        if not 0 < share <= 1000:
            raise UsageError(f"`{word}` is no share of memory", "expected such as 50%")
        return Arm(word, int(plan.resident_budget_bytes * share / 100))
    return Arm(word, parse_bytes(word))


def _prompts(
    path: Path, index: StoreIndex, args: argparse.Namespace
) -> tuple[list[list[int]], str]:
    """One prompt for each round, the same for every arm; and what to say about them."""
    from ..models import parse_config
    from ..tokenizer import Tokenizer

    if args.prompts == "random":
        generator, vocab = random.Random(0), parse_config(index.config).vocab
        prompts = [
            [generator.randrange(vocab) for _ in range(args.prompt_tokens)]
            for _ in range(args.repeats)
        ]
        return prompts, "random tokens: hits and stalls are not those of text"
    tokenizer = Tokenizer.load(path)
    if tokenizer is None:
        raise UsageError(
            "no real prompts without a tokenizer", f"`{path}` has none", "use --prompts random"
        )
    from .text import TEXT

    text = TEXT
    if args.text is not None:
        text = Path(args.text).read_text(encoding="utf-8", errors="replace")
    num_tokens = len(tokenizer.encode(text))
    if not num_tokens:
        raise UsageError(f"`{args.text}` holds no text")
    step = max(1, num_tokens // args.repeats)
    prompts = [
        text_tokens(tokenizer, text, args.prompt_tokens, turn * step)
        for turn in range(args.repeats)
    ]
    origin = "the built-in text" if args.text is None else args.text
    again = ", repeated" if num_tokens < args.prompt_tokens else ""
    return prompts, f"{origin} of {num_tokens} tokens{again}, from another place each round"


def _limits(index: StoreIndex, args: argparse.Namespace) -> dict[str, Any]:
    from ..config import READER_THREADS, num_cores

    storage = storage_bandwidth(index, args.io, READER_THREADS)
    return {"dram_bytes_per_s": dram_bandwidth(args.threads or num_cores()), "storage": storage}


def _measure_one(
    path: Path, arm: Arm, prompt: list[int], context: int, args: argparse.Namespace
) -> dict[str, Any]:
    from ..engine import Engine
    from ..preflight import release_free_memory
    from ..session import Session

    files = [path / EXPERTS_FILE, path / TRUNK_FILE]
    gc.collect()
    release_free_memory()  # what the arm before has left does not count here
    with PeakMemory(files) as peak:
        with Engine.from_pretrained(
            path,
            memory=arm.budget_bytes,
            context=context,
            policy=args.policy,
            threads=args.threads,
            backend=args.backend,
            kv_bits=args.kv_bits,
            io=args.io,
        ) as engine:
            for line in engine.notes:
                note(f"note: {arm.name}: {line}")
            cache_bytes = engine.cache.capacity_bytes
            with Session(engine) as session:
                greedy(session, prompt, min(WARM_UP_TOKENS, args.tokens))
                session.reset()
                decoded = greedy(session, prompt, args.tokens)
    return {
        "expert_cache_bytes": cache_bytes,
        **_speed(decoded, len(prompt)),
        "peak_rss_bytes": peak.rss_bytes,
        "peak_anonymous_bytes": peak.anonymous_bytes,
        "peak_page_cache_bytes": peak.page_cache_bytes,
        "output_hash": output_hash(decoded.token_ids),
        "logits_hash": decoded.logits_hash,
    }


def _speed(decoded: Decoded, prompt_tokens: int) -> dict[str, Any]:
    steps = sorted(decoded.step_s)
    count = max(1, len(steps))
    demand = decoded.decode["hits"] + decoded.decode["misses"]
    return {
        "ttft_s": decoded.prefill_s,
        "prefill_tokens_per_s": prompt_tokens / decoded.prefill_s,
        "prefill_bytes_read": decoded.prefill["bytes_read"],
        "decode_tokens_per_s": len(steps) / decoded.decode_s if steps else None,
        "step_p50_s": steps[len(steps) // 2] if steps else None,
        "step_p95_s": steps[len(steps) * 95 // 100] if steps else None,
        "hit_rate": decoded.decode["hits"] / demand if demand else None,
        "bytes_read_per_token": decoded.decode["bytes_read"] / count,
        "stall_s_per_token": decoded.decode["stall_s"] / count,
        "stall_share": decoded.decode["stall_s"] / decoded.decode_s if steps else None,
    }


def _reached(
    result: dict[str, Any], limits: dict[str, Any], index: StoreIndex, args: argparse.Namespace
) -> dict[str, Any]:
    """Both bounds of a decoded token, and the share of the speed they allow that was reached."""
    stored = result["bytes_read_per_token"] / limits["storage"]["bytes_per_s"]
    tokens = args.prompt_tokens + args.tokens // 2
    touched = touched_bytes(index, tokens, args.kv_bits) / limits["dram_bytes_per_s"]
    speed = result["decode_tokens_per_s"]
    return {
        "storage_bound_s": stored,
        "dram_bound_s": touched,
        "reached": None if speed is None else max(stored, touched) * speed,
    }


def describe_limits(limits: list[dict[str, Any]]) -> str:
    """One line about the machine, for people."""
    storage = [each["storage"]["bytes_per_s"] for each in limits]
    dram = [each["dram_bytes_per_s"] for each in limits]
    return (
        f"storage {format_bytes(int(min(storage)))}/s to {format_bytes(int(max(storage)))}/s "
        f"({limits[0]['storage']['io']}), memory {format_bytes(int(min(dram)))}/s to "
        f"{format_bytes(int(max(dram)))}/s, measured before each round"
    )
