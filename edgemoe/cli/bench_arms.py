"""The measuring half of `bench`: arms, rounds, limits around every run, and what a row holds."""

import argparse
import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import BudgetError, UsageError
from ..runtime.index import EXPERTS_FILE, TRUNK_FILE, StoreIndex, load_index
from .bench_figures import beside_control, bounds, joined_limits, reader_cost, speeds
from .bench_limits import machine, measure_limits, touched_bytes
from .bench_memory import PeakMemory
from .bench_prompts import make_prompts, prompt_length
from .decode import Decoded, greedy
from .plan import store_plan
from .render import note, one_line, output_hash
from .replay import Recorded, fit, replay
from .routing_options import routing_argument

SCHEMA = 2
WARM_UP_TOKENS = 8
USUAL = ("floor", "50%", "100%")
CONTROL = "100%"


@dataclass(slots=True)
class Arm:
    """One budget. `is_resident`: it keeps every expert, and reads them all before it is measured.
    `is_control`: in the other arms' rows only."""

    name: str
    budget_bytes: int
    is_resident: bool
    is_control: bool = False


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every arm in every round; returns the JSON document.

    Raises BudgetError where no arm fits.
    """
    index = load_index(path)
    recorded = None
    if args.replay is not None:
        recorded = _recorded(index, args)
    elif args.prompt_tokens is None:
        args.prompt_tokens = prompt_length(index, args)
    context = args.context or args.prompt_tokens + args.tokens
    if context < args.prompt_tokens + args.tokens:
        raise UsageError(
            f"--context {context} is too short",
            f"-p {args.prompt_tokens} and -n {args.tokens} need more",
        )
    plan = store_plan(index, None, context, args.kv_bits)
    arms = make_arms(args, plan)
    prompts: list[Any] = [recorded] * args.repeats
    if recorded is None:
        prompts, prompt_note = make_prompts(path, index, args)
    else:
        prompt_note = "; ".join([f"replays {args.replay}", *recorded.notes])
    rows: dict[str, dict[str, Any]] = {
        arm.name: {
            "arm": arm.name,
            "budget_bytes": arm.budget_bytes,
            "is_control": arm.is_control,
            "rounds": [],
        }
        for arm in arms
    }
    failure = None
    top_k = recorded.decoded.ids.shape[2] if recorded else None
    middle = args.prompt_tokens + args.tokens // 2
    touched = touched_bytes(index, middle, args.kv_bits, top_k)
    for turn, prompt in enumerate(prompts):
        control = None
        for arm in arms:
            if "error" in rows[arm.name]:
                continue
            note(f"round {turn + 1} of {len(prompts)}: {arm.name}")
            try:
                result = _measure_between_limits(path, index, arm, prompt, context, args)
            except BudgetError as error:
                failure = error
                rows[arm.name]["error"] = f"{error.what}; {error.next_step}"
                note(f"note: {arm.name}: {one_line(error.what)}")
                continue
            result |= bounds(result, result["limits"], touched)
            rows[arm.name]["rounds"].append(result)
            if arm.is_resident:
                control = result
        if control is not None:
            for row in rows.values():
                if len(row["rounds"]) == turn + 1:
                    row["rounds"][turn] |= beside_control(row["rounds"][turn], control)
    if failure is not None and all("error" in row or row["is_control"] for row in rows.values()):
        raise failure
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "model": path.name.removesuffix(".edgemoe"),
        "experts_sha256": index.sha256.get(EXPERTS_FILE),
        "prompts": {
            "kind": "replay" if recorded else args.prompts,
            "tokens": args.prompt_tokens,
            "note": prompt_note,
        },
        "decoded_tokens": args.tokens,
        "context": context,
        "policy": args.policy,
        "prefetch": args.prefetch or "auto",
        "throttle_bytes_per_s": args.throttle,
        "threads": args.threads,
        "touched_bytes_per_token": touched,
        "full_residence_bytes": plan.resident_budget_bytes,
        "floor_bytes": plan.floor_bytes,
        "rows": list(rows.values()),
    }


def _recorded(index: StoreIndex, args: argparse.Namespace) -> Recorded:
    """The trace to replay, cut to the tokens asked for, which `args` then names."""
    if args.text is not None or args.prompts == "random":
        raise UsageError("--replay brings its own tokens", "", "leave --text and --prompts out")
    recorded = fit(args.replay, index, args.replay_layers)
    args.prompt_tokens = min(args.prompt_tokens or len(recorded.prompt), len(recorded.prompt))
    args.tokens = min(args.tokens, len(recorded.decoded))
    # The last ones: what is decoded after them follows from them.
    first = len(recorded.prompt) - args.prompt_tokens
    prompt, decoded = recorded.prompt[first:], recorded.decoded[: args.tokens]
    return replace(recorded, prompt=prompt, decoded=decoded)


def make_arms(args: argparse.Namespace, plan: Any) -> list[Arm]:
    """What `--memory` names, and an arm without reads if there is none among them.

    Of the usual budgets, those below the floor are left out, which a small model's are.
    """
    arms = [_arm(word, plan) for word in args.memory or USUAL]
    if args.memory is None:
        for arm in [arm for arm in arms if arm.budget_bytes < plan.floor_bytes]:
            least = format_bytes(plan.floor_bytes)
            note(f"note: {arm.name} is left out: below the floor of {least}")
            arms.remove(arm)
    if any(arm.is_resident for arm in arms) or not args.control:
        return arms
    import psutil

    free = psutil.virtual_memory().available
    if plan.resident_budget_bytes > free:
        needed = format_bytes(plan.resident_budget_bytes)
        note(f"note: no control without reads: it needs {needed}, free are {format_bytes(free)}")
        return arms
    return [*arms, Arm(CONTROL, plan.resident_budget_bytes, True, is_control=True)]


def _arm(word: str, plan: Any) -> Arm:
    """`floor`, a percentage of full residence, or a size. The floor moves with what the process
    already holds."""
    from ..runtime.amounts import parse_bytes

    full = plan.resident_budget_bytes
    if word == "floor":
        num_bytes = plan.floor_bytes
    elif word.endswith("%"):
        try:
            share = float(word[:-1])
        except ValueError:
            share = 0.0
        if not 0 < share <= 1000:
            raise UsageError(f"`{word}` is no share of memory", "expected such as 50%")
        num_bytes = int(full * share / 100)
    else:
        num_bytes = parse_bytes(word)
    return Arm(word, num_bytes, num_bytes >= full)


def _measure_between_limits(
    path: Path,
    index: StoreIndex,
    arm: Arm,
    prompt: list[int] | Recorded,
    context: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One run of one arm, with what the machine can do right before and right after it."""
    from ..config import num_cores

    threads = args.threads or num_cores()
    before = measure_limits(index, args.io, threads, args.throttle)
    result = _measure_one(path, arm, prompt, context, args)
    after = measure_limits(index, args.io, threads, args.throttle)
    return result | {"limits": joined_limits(before, after), "limits_around": [before, after]}


def _measure_one(
    path: Path, arm: Arm, prompt: list[int] | Recorded, context: int, args: argparse.Namespace
) -> dict[str, Any]:
    from ..engine import Engine
    from ..preflight import release_free_memory

    files = [path / EXPERTS_FILE, path / TRUNK_FILE]
    gc.collect()
    release_free_memory()  # what the arm before has left does not count here
    with PeakMemory(files) as peak:
        with Engine.from_pretrained(
            path,
            memory=arm.budget_bytes,
            context=context,
            policy=args.policy,
            prefetch=args.prefetch,
            threads=args.threads,
            backend=args.backend,
            kv_bits=args.kv_bits,
            io=args.io,
            warm_start="off",
            throttle=args.throttle,
            set=args.set,
            set_mode=args.set_mode,
            set_threshold=args.set_threshold,
            **routing_argument(args),
        ) as engine:
            for line in engine.notes:
                note(f"note: {arm.name}: {line}")
            routing = engine.routing
            if arm.is_resident and args.set_mode != "hard":
                engine.cache.preload()
            decoded, cost = decode_warm(engine, prompt, args.tokens)
            cache_bytes = engine.cache.capacity_bytes  # while tokens are decoded
            counts = engine.routing_counts() if routing else None
    return {
        "expert_cache_bytes": cache_bytes,
        "routing": routing.label if routing else None,
        "mean_active_experts": counts and counts.mean_active,
        "dropped": counts and counts.num_dropped,
        "stand_ins": counts and counts.num_stand_ins,
        **speeds(decoded, args.prompt_tokens),
        **cost,
        "prefetch": engine.prefetch.report(),
        "peak_rss_bytes": peak.rss_bytes,
        "peak_anonymous_bytes": peak.anonymous_bytes,
        "peak_page_cache_bytes": peak.page_cache_bytes,
        "output_hash": output_hash(decoded.token_ids),
        "logits_hash": decoded.logits_hash,
    }


def decode_warm(
    engine: Any, prompt: list[int] | Recorded, num_tokens: int
) -> tuple[Decoded, dict[str, Any]]:
    """Warm up, begin again, and measure; the second is what reading cost.

    The warm-up decodes the prompt's tokens: the cache learns, and must not know the measured ones.
    """
    from ..kv_cache import KVCache
    from ..session import Session

    num_warm_up = min(WARM_UP_TOKENS, num_tokens)  # the context has room for those
    if isinstance(prompt, Recorded):
        kv_cache = KVCache.for_model(engine.args, engine.context, engine.config.kv_bits)
        replay(engine, kv_cache, prompt.prompt, prompt.prompt[:num_warm_up])
        kv_cache.trim(0)
        reads = engine.reader.stats()
        decoded = replay(engine, kv_cache, prompt.prompt, prompt.decoded[:num_tokens])
    else:
        with Session(engine) as session:
            session.logits(prompt)
            for token in prompt[:num_warm_up]:
                session.step(token)
            session.reset()
            reads = engine.reader.stats()
            decoded = greedy(session, prompt, num_tokens)
    return decoded, reader_cost(reads, engine.reader.stats())
