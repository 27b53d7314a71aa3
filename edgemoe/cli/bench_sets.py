"""`bench --sets`: the full model against its pruned sets and other stores, at one memory budget.

What a token costs is measured on tokens of the text, the same for every arm, since arms that write
themselves would be measured on different texts. Arms take turns within a round; each opens its own
engine. What does not depend on the budget (losses, answers, routing) is measured once.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from ..runtime.index import EXPERTS_FILE, TRUNK_FILE
from .bench_figures import joined_limits
from .bench_limits import machine, measure_limits, touched_bytes
from .render import note
from .sets_arms import Arm, make_arms
from .sets_once import measure_once
from .sets_speed import Budget, control, limiter, run_arm

if TYPE_CHECKING:
    from ..quant.answers import Conversation

SCHEMA = 1
PROMPT_TOKENS = 256
NAMES = ("text", "other")  # of the domain, and of another one


def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run everything; returns the JSON document."""
    if args.set is not None or args.replay is not None:
        raise UsageError("--sets names its arms itself", "", "leave --set and --replay out")
    arms = make_arms(path, args)
    full = arms[0].index
    conversations = _conversations(path, args)
    texts = _texts(full, args)
    num_prompt, num_tokens = _lengths(full, texts["text"], args)
    budget = _budget(full, num_prompt + num_tokens, args)
    rows = {arm.name: _row(arm) for arm in arms}
    measure_once(arms, rows, texts, conversations, budget, args)
    limits = _measure_rounds(arms, rows, texts["text"], num_prompt, num_tokens, budget, args)
    return {
        "schema": SCHEMA,
        "machine": machine(),
        "model": path.name.removesuffix(".edgemoe"),
        "texts": {name: len(ids) for name, ids in texts.items()},
        "text_files": {"text": args.text or "the built-in text", "other": args.other_text},
        "prompt_tokens": num_prompt,
        "decoded_tokens": num_tokens,
        "eval_tokens": args.eval_tokens,
        "curve_tokens": min(args.curve_tokens, len(texts["text"])),
        "budget_bytes": budget.memory_bytes,
        "expert_cache_bytes": budget.cache_bytes,
        "expert_cache_share": budget.cache_bytes / full.expert_bytes,
        "throttle_bytes_per_s": args.throttle,
        "prefetch": args.prefetch or "none",
        "policy": args.policy,
        "limits": limits,
        "rows": list(rows.values()),
    }


# ---- what is asked for --------------------------------------------------------------------------


def _texts(index: Any, args: argparse.Namespace) -> dict[str, list[int]]:
    """Token ids of --text (else the built-in one) and of --other-text, if any."""
    from ..models import parse_config
    from ..quant.windows import read_tokens
    from ..tokenizer import Tokenizer
    from .text import TEXT

    tokenizer = Tokenizer.load(index.path)
    found = {}
    for name, file in zip(NAMES, (args.text, args.other_text), strict=True):
        if file is not None:
            found[name] = read_tokens(file, tokenizer)
        elif name == "text":
            if tokenizer is None:
                raise UsageError("no text without a tokenizer", "", "--text FILE.npy, token ids")
            found[name] = tokenizer.encode(TEXT)
    vocab = parse_config(index.config).vocab
    for ids in found.values():
        if len(ids) < 2 or not 0 <= min(ids) <= max(ids) < vocab:
            raise UsageError(
                "a text cannot be read by this model",
                f"it has {len(ids)} tokens, expected at least 2, below {vocab} each",
            )
    return found


def _lengths(index: Any, ids: list[int], args: argparse.Namespace) -> tuple[int, int]:
    """Tokens of the prompt, and those decoded after it: what the context has room for."""
    from ..models import parse_config

    room = min(args.context or parse_config(index.config).max_context, len(ids))
    num_tokens = min(args.tokens, max(2, room // 2))
    num_prompt = args.prompt_tokens or min(PROMPT_TOKENS, room - num_tokens)
    if num_prompt < 1 or num_prompt + num_tokens > room:
        raise UsageError(
            f"-p {num_prompt} and -n {num_tokens} are too many tokens",
            f"text and context have room for {room}",
        )
    return num_prompt, num_tokens


def _budget(index: Any, context: int, args: argparse.Namespace) -> Budget:
    from .bench_arms import _arm
    from .plan import store_plan

    if args.memory is None:
        return Budget(None, int(args.share * index.expert_bytes))
    if len(args.memory) > 1:
        raise UsageError("--sets has one budget for all arms", f"got {', '.join(args.memory)}")
    plan = store_plan(index, None, context, args.kv_bits)
    memory = _arm(args.memory[0], plan).budget_bytes
    return Budget(memory, store_plan(index, memory, context, args.kv_bits).cache_bytes)


def _conversations(path: Path, args: argparse.Namespace) -> "list[Conversation]":
    """--questions, else those that come with the bundled model."""
    from ..engine import DEMO
    from ..quant.answers import read_conversations

    file = args.questions
    if file is None and path.resolve() == DEMO.resolve():
        file = DEMO.with_name("questions.jsonl")
    return [] if file is None else read_conversations(file)


def _row(arm: Arm) -> dict[str, Any]:
    files = [arm.path / name for name in (TRUNK_FILE, EXPERTS_FILE)]
    whole = sum(file.stat().st_size for file in files)
    return {
        "arm": arm.name,
        "store": str(arm.path),
        "set": arm.active.to_dict() if arm.active is not None else None,
        "lossless": arm.is_lossless,
        "num_experts": arm.num_experts,
        "expert_bytes": arm.expert_bytes,
        "stored_bytes": whole - arm.index.expert_bytes + arm.expert_bytes,
        "rounds": [],
    }


# ---- rounds --------------------------------------------------------------------------------------


def _measure_rounds(
    arms: list[Arm],
    rows: dict[str, dict[str, Any]],
    ids: list[int],
    num_prompt: int,
    num_tokens: int,
    budget: Budget,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Every arm in every round, another one first each time; returns the limits between rounds."""
    from ..config import num_cores

    def limits_now() -> dict[str, Any]:
        return measure_limits(arms[0].index, args.io, args.threads or num_cores(), args.throttle)

    size, limits = num_prompt + num_tokens, [limits_now()]
    step = max(1, (len(ids) - size) // max(1, args.repeats - 1))
    for turn in range(args.repeats):
        first = min(turn * step, len(ids) - size)
        tokens = ids[first : first + size]
        begin = turn % len(arms)
        for arm in arms[begin:] + arms[:begin]:
            note(f"round {turn + 1} of {args.repeats}: {arm.name}")
            rows[arm.name]["rounds"].append(run_arm(arm, budget, tokens, num_prompt, args))
        without_reads = _controls(arms, tokens, num_prompt, args)
        limits.append(limits_now())
        around = joined_limits(limits[-2], limits[-1])
        for arm in arms:
            active = arm.routing.active_experts if arm.routing is not None else None
            touched = touched_bytes(arm.index, num_prompt + num_tokens // 2, args.kv_bits, active)
            run = rows[arm.name]["rounds"][-1]
            run |= limiter(run, around, touched, without_reads.get((arm.path, arm.routing)))
    return limits


def _controls(
    arms: list[Arm], tokens: list[int], num_prompt: int, args: argparse.Namespace
) -> dict[tuple[Path, Any], float]:
    """Seconds a token by store and routing, where nothing has to be read; of those that fit into
    memory."""
    import psutil

    from .plan import store_plan

    found = {}
    for arm in arms if args.control else ():
        if (arm.path, arm.routing) in found:
            continue
        needed = store_plan(arm.index, None, len(tokens), args.kv_bits).resident_budget_bytes
        if needed <= psutil.virtual_memory().available:
            note(f"without reads: {arm.path.name}")
            found[arm.path, arm.routing] = control(arm, tokens, num_prompt, args)
    return found
