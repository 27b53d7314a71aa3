"""`edgemoe prune STORE`: choose the experts that a task needs, as a set beside the store."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from . import options, prune_merge, prune_task
from .render import note, open_output

if TYPE_CHECKING:
    from ..quant.prune import Amount
    from ..quant.prune_plan import PrunePlan
    from ..runtime.index import StoreIndex
    from ..runtime.sets import ExpertSet

METHODS = ("reap", "frequency", "soft-count", *prune_merge.METHODS)
EPILOG = """A set is a small file, STORE/sets/NAME.json; no weight changes. The methods uncurl,
msmoe, mc-smoe and diversify merge experts instead, into a store of their own.
The plan is printed first.
What a set costs on your text: edgemoe eval STORE STORE --set NAME --set-mode hard --text FILE

  edgemoe prune NAME.edgemoe --profile code --keep 50% --name code
  edgemoe prune NAME.edgemoe --text code.txt --fit 4GiB --name code
  edgemoe prune NAME.edgemoe --set code --compact code.edgemoe
  edgemoe prune NAME.edgemoe --method msmoe --keep 75% --out merged.edgemoe
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--name", metavar="NAME", help="of the set")
    parser.add_argument("--method", choices=METHODS, default="reap", help="default: reap")
    group = parser.add_argument_group("what stays")
    group.add_argument(
        "--keep", type=prune_task.share, metavar="SHARE", help="of every layer, such as 50%%"
    )
    group.add_argument("--experts", type=options.count, metavar="N", help="of every layer")
    group.add_argument(
        "--fit",
        type=options.size,
        metavar="SIZE",
        help="as many as stay in memory with --memory SIZE, so that nothing is read any more",
    )
    group.add_argument(
        "--global",
        dest="across",
        action="store_true",
        help="the best of all layers instead of as many of each",
    )
    group.add_argument(
        "--spare-reads",
        type=float,
        default=0.0,
        metavar="X",
        help="let go what is worth less than what it reads: X (0 to below 1) of its share of the "
        "reads is taken from its share of the score (default: 0)",
    )
    group.add_argument(
        "--keep-first-layer",
        action=argparse.BooleanOptionalAction,
        help="all of the first MoE layer, besides (default: where experts are merged)",
    )
    group = parser.add_argument_group("what is known of the task")
    group.add_argument(
        "--profile",
        metavar="NAME",
        help="of edgemoe calibrate --name NAME, or a file (default: the store's own profile)",
    )
    group.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="instead: run this text, or token ids as .npy; repeatable",
    )
    group.add_argument("--tokens", type=options.count, metavar="N", help="of --text, at most (50k)")
    group.add_argument("--trace", metavar="FILE", help="replay this routing, for the hit rates")
    group.add_argument(
        "--caches",
        type=options.word_list,
        metavar="LIST",
        help="expert caches to plan for: sizes, or percentages of all experts "
        "(default: 12.5%%,25%%,50%%)",
    )
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory", type=options.size, metavar="SIZE", help="to run --text in: of the process"
    )
    group.add_argument("--threads", type=options.count, metavar="N", help="compute threads")
    group.add_argument("--context", type=options.count, metavar="N", help="tokens, for --fit")
    group.add_argument("--kv-bits", type=int, choices=(8, 16, 32), default=16, help="default: 16")
    group = parser.add_argument_group("a store of its own")
    group.add_argument("--set", metavar="NAME", help="a set there is, or A+B, or 'A&B'")
    group.add_argument(
        "--compact", metavar="OUT", help="write a smaller store that holds --set, for hard mode"
    )
    prune_merge.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace a set of this name")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_path(args) or options.bundled_model())
    if args.set is not None or args.compact is not None:
        return _compact(path, args)
    amounts = [value for value in (args.keep, args.experts, args.fit) if value is not None]
    if len(amounts) != 1:
        raise UsageError("how much stays?", "expected one of --keep, --experts, --fit")
    if args.text and args.profile is not None:
        raise UsageError("--profile and --text both say what the task is", "", "give one")
    if args.method in prune_merge.METHODS:
        open_output()
        return prune_merge.run(path, args)
    for name in ("out", "checkpoint", "router", "rank", "dense_neurons", "body_size"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"`--{name.replace('_', '-')}` does not go with `--method {args.method}`",
                f"expected one of {', '.join(prune_merge.METHODS)}",
            )
    from ..runtime.sets import check_name, save_set, set_path

    if args.name is None:
        raise UsageError("the set needs a name", "", "--name NAME")
    target = set_path(path, check_name(args.name))
    if target.exists() and not (args.force or args.dry_run):
        raise UsageError(
            f"there is a set `{args.name}` already", str(target), "--force replaces it"
        )
    open_output()
    from ..quant.prune_plan import plan_text

    with ExitStack() as stack:
        expert_set, plan = _make(path, args, stack)
    if args.json:
        document = asdict(plan) | {
            "name": args.name,
            "method": args.method,
            "kept": expert_set.kept,
        }
        print(json.dumps(document, indent=1), flush=True)
    else:
        print("\n".join(plan_text(plan)), flush=True)
    for line in plan.warnings:
        note(f"warning: {line}")
    if not args.dry_run:
        save_set(path, expert_set)
        note(f"wrote {target}; use it with --set {args.name} --set-mode hard")
    return 0


def _compact(path: Path, args: argparse.Namespace) -> int:
    """Write the store of a set."""
    if args.set is None or args.compact is None:
        raise UsageError("a store of a set needs both", "", "--set NAME --compact OUT.edgemoe")
    open_output()
    from ..quant.compact import compact
    from ..quant.progress import open_progress

    progress = open_progress()
    try:
        made = compact(path, args.set, args.compact, progress)
    finally:
        progress.close()
    document = {
        "path": str(made.path),
        "num_experts": len(made.records),
        "expert_bytes": made.expert_bytes,
    }
    if args.json:
        print(json.dumps(document, indent=1), flush=True)
    else:
        count, size = document["num_experts"], format_bytes(document["expert_bytes"])
        print(f"{args.compact}: {count} experts, {size}", flush=True)
    return 0


def _make(path: Path, args: argparse.Namespace, stack: ExitStack) -> "tuple[ExpertSet, PrunePlan]":
    """The set, and what is expected of it."""
    from ..active_set import owner_of
    from ..models import store_args
    from ..quant.prune import choose, scores_of
    from ..quant.prune_plan import make_plan
    from ..quant.prune_reads import spare_reads
    from ..runtime.index import load_index
    from ..runtime.sets import ExpertSet

    index = load_index(path)
    model = store_args(index)
    owner = owner_of(index, model)
    amount = replace(_amount(index, args), whole=frozenset(model.hash_layers))
    if model.hash_layers:
        note(f"hash-routed layers stay whole: {', '.join(map(str, model.hash_layers))}")
    engine, texts = prune_task.open_text(path, args, stack) if args.text else (None, [])
    profile = prune_task.profile(path, args, engine, texts, owner)
    scores = scores_of(profile, args.method)
    chosen_by = spare_reads(scores, profile, index, args.spare_reads)
    kept = choose(chosen_by, index, owner.top_k, amount, not args.across)
    parameters = {
        "keep": args.keep,
        "experts": args.experts,
        "fit_bytes": args.fit,
        "across_layers": args.across,
        "spare_reads": args.spare_reads,
        "keep_first_layer": bool(args.keep_first_layer),
        "profile": profile.name,
        "tokens": profile.num_tokens,
        "texts": profile.texts,
    }
    expert_set = ExpertSet(
        args.name,
        kept,
        owner.num_experts,
        owner.fingerprint,
        owner.tokenizer_sha256,
        args.method,
        {name: value for name, value in parameters.items() if value not in (None, False, [])},
        {layer: _shares(profile.layers[layer].hard_count, ids) for layer, ids in kept.items()},
    )
    expert_set.check(owner)
    rows = prune_task.rows(args, index, profile, expert_set, engine, texts)
    return expert_set, make_plan(kept, scores, profile, index, *rows)


def _amount(index: "StoreIndex", args: argparse.Namespace) -> "Amount":
    from ..quant.prune import Amount
    from ..runtime.budget import BelowFloorError
    from .plan import store_plan

    if args.fit is None:
        return Amount(args.keep, args.experts, keep_first=bool(args.keep_first_layer))
    try:
        plan = store_plan(index, args.fit, args.context, args.kv_bits)
    except BelowFloorError as error:
        error.what = error.what.replace("--memory", "--fit")
        error.next_step = error.next_step.replace("--memory", "--fit")
        raise
    if plan.is_resident:
        note("note: all experts fit into this budget; nothing has to go")
    return Amount(num_bytes=plan.cache_bytes, keep_first=bool(args.keep_first_layer))


def _shares(counts: Any, ids: tuple[int, ...]) -> tuple[float, ...]:
    total = max(int(counts.sum()), 1)
    return tuple(float(counts[expert]) / total for expert in ids)
