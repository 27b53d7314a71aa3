"""`edgemoe verify STORE`: every checksum, then streamed against resident logits, bit for bit."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from ..runtime.format import PAGE_BYTES
from . import options
from .render import note, open_output

EPILOG = """The second part decodes greedily after a built-in text at several sizes of the expert
cache and prints a hash of all logits of each run. `floor` is the least cache that works, `2x floor`
twice that, `half` holds half of the experts, `resident` all. Exit code 1 where a record or file is
damaged or where two runs differ by one bit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--quick", action="store_true", help="checksums only")
    parser.add_argument(
        "--tokens", type=options.count, default=64, metavar="N", help="to decode (default: 64)"
    )
    parser.add_argument(
        "--prompt-tokens", type=options.count, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument(
        "--policies",
        type=options.word_list,
        default=[options.POLICIES[0]],
        metavar="LIST",
        help="evictions to compare, or `all` (default: forecast)",
    )
    parser.add_argument(
        "--threads", type=options.counts, default=[None], metavar="LIST", help="such as 1,2"
    )
    options.add_numeric_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    policies = list(options.POLICIES) if args.policies == ["all"] else args.policies
    for policy in policies:
        if policy not in options.POLICIES:
            raise UsageError(
                f"unknown policy `{policy}`", f"policies: all, {', '.join(options.POLICIES)}"
            )
    path = Path(options.model_path(args) or options.bundled_model())
    open_output()
    say: Callable[[str], None] = note if args.json else _print
    document: dict[str, Any] = {"store": str(path), **check_sums(path, args, say)}
    if not args.quick and not document["damaged"]:
        document["runs"] = compare_runs(path, policies, args, say)
        document["identical"] = len({run["logits_hash"] for run in document["runs"]}) == 1
    document["ok"] = not document["damaged"] and document.get("identical", True)
    if args.json:
        print(json.dumps(document, indent=1))
    elif document["damaged"]:
        say("the store is damaged: copy it again, or convert the checkpoint again")
    elif args.quick:
        say("the store is whole")
    elif document["ok"]:
        say(f"the store is whole, and all {len(document['runs'])} runs have the same logits")
    else:
        say("NOT IDENTICAL: streaming changed the logits")
    return 0 if document["ok"] else 1


def _print(text: str) -> None:
    print(text, flush=True)


def check_sums(path: Path, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Check every record and file of a store; says what is damaged as it is found."""
    from ..models.fingerprint import checkpoint_fingerprint
    from ..runtime.index import load_index
    from ..runtime.stand_ins import STAND_INS_FILE, read_stand_ins
    from ..runtime.store import Store

    damaged: list[dict[str, Any]] = []
    index, stand_ins = load_index(path), None
    if (path / STAND_INS_FILE).is_file():
        stand_ins = read_stand_ins(index, checkpoint_fingerprint(index))
    with Store(path, io=args.io, backend=args.backend, stand_ins=stand_ins) as store:
        if not store.reader.is_direct:
            note(f"note: experts are read {store.reader.io_note}")
        for layer, expert, good in store.verify():
            if good:
                continue
            num_experts = index.layer_to_num_experts[layer]
            name = f"layers.{layer}.experts.{expert % num_experts}"
            if expert < num_experts:
                damaged.append({"layer": layer, "expert": expert})
                say(f"BAD  expert record `{name}`")
            else:
                damaged.append({"layer": layer, "stand_in": expert % num_experts})
                say(f"BAD  stand-in of `{name}`")
        for kind, records in (("expert records", index.records), ("stand-ins", stand_ins or {})):
            num_bad = sum(("stand_in" in each) == (kind == "stand-ins") for each in damaged)
            rows = index.rows_text if records is index.records else ""
            total = format_bytes(sum(record.num_bytes for record in records.values()))
            of = f"{len(records)} {kind}{rows}"
            if records:
                say(f"{len(records) - num_bad} of {of} have their checksums ({total})")
        for name, good in store.verify_files():
            if not good:
                damaged.append({"file": name})
            say(f"{'ok  ' if good else 'BAD '} {name} (sha256)")
    counts = {"num_records": len(index.records), "num_stand_ins": len(stand_ins or ())}
    return counts | {"damaged": damaged}


def compare_runs(
    path: Path, policies: list[str], args: argparse.Namespace, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Decode after the same text with every cache size, policy and thread count; one row each."""
    rows = []
    sizes = _cache_sizes(path, args, say)
    for threads in args.threads:
        for policy in policies:
            for name, cache_bytes in sizes:
                row = {"budget": name, "cache_bytes": cache_bytes, "policy": policy}
                row |= {"threads": threads, **_run(path, row, threads, args)}
                rows.append(row)
                say(_line(row))
    return rows


def _line(row: dict[str, Any]) -> str:
    size = format_bytes(row["cache_bytes"])
    threads = "" if row["threads"] is None else f", threads {row['threads']}"
    hits = 100 * row["hits"] / max(1, row["hits"] + row["misses"])
    return (
        f"{row['budget']:<9} {size:>8} of experts, {row['policy']}{threads}, "
        f"{row['tokens']} tokens, hit {hits:3.0f} %: logits {row['logits_hash'][:32]}"
    )


def _cache_sizes(
    path: Path, args: argparse.Namespace, say: Callable[[str], None]
) -> list[tuple[str, int]]:
    """Names and sizes of the expert caches to compare, without those that are the same."""
    import psutil

    from ..runtime.index import load_index
    from .plan import store_plan

    plan = store_plan(load_index(path), None, _context(args), args.kv_bits)
    floor, full = plan.min_cache_bytes, plan.max_cache_bytes
    sizes = {"floor": floor, "2x floor": 2 * floor, "half": max(floor, full // 2)}
    sizes = {name: num_bytes // PAGE_BYTES * PAGE_BYTES for name, num_bytes in sizes.items()}
    if plan.resident_budget_bytes <= psutil.virtual_memory().available:
        sizes["resident"] = full
    else:
        say(
            f"note: not compared with all experts resident: that takes "
            f"{format_bytes(plan.resident_budget_bytes)}, more than is free"
        )
    chosen: dict[int, str] = {}
    for name, num_bytes in reversed(sizes.items()):
        chosen.setdefault(min(num_bytes, full), name)
    return [(name, num_bytes) for num_bytes, name in sorted(chosen.items())]


def _context(args: argparse.Namespace) -> int:
    return args.prompt_tokens + args.tokens


def _run(
    path: Path, row: dict[str, Any], threads: int | None, args: argparse.Namespace
) -> dict[str, Any]:
    from ..engine import Engine
    from ..session import Session
    from .decode import greedy, text_tokens
    from .text import TEXT

    with Engine.from_pretrained(
        path,
        context=_context(args),
        policy=row["policy"],
        threads=threads,
        backend=args.backend,
        kv_bits=args.kv_bits,
        io=args.io,
        warm_start="off",
        cache_bytes=row["cache_bytes"],
    ) as engine:
        if engine.tokenizer is not None:
            prompt = text_tokens(engine.tokenizer, TEXT, args.prompt_tokens)
        else:
            generator = random.Random(0)
            prompt = [generator.randrange(engine.args.vocab) for _ in range(args.prompt_tokens)]
        cache_bytes = engine.cache.capacity_bytes
        if cache_bytes < row["cache_bytes"]:
            size = format_bytes(cache_bytes)
            note(f"note: {row['budget']}: EDGEMOE_MEMORY leaves only {size} for experts")
        with Session(engine) as session:
            decoded = greedy(session, prompt, args.tokens)
    return {
        "cache_bytes": cache_bytes,
        "tokens": len(decoded.token_ids),
        "hits": decoded.prefill["hits"] + decoded.decode["hits"],
        "misses": decoded.prefill["misses"] + decoded.decode["misses"],
        "logits_hash": decoded.logits_hash,
    }
