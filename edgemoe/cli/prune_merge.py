"""`edgemoe prune STORE --method uncurl|msmoe|diversify --out OUT`: a store of merged experts."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from . import prune_task
from .render import note

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..quant.merge import Merge, Similarities
    from ..quant.merge_plan import MergePlan
    from ..quant.progress import Progress
    from ..quant.prune_plan import BudgetRow
    from ..runtime.index import StoreIndex
    from ..runtime.profile import Profile

METHODS = ("uncurl", "msmoe", "diversify")
ROUTERS = ("index-map", "merged", "untrained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experts merged, in a new store")
    group.add_argument(
        "--out", metavar="OUT", help="the store that --method uncurl, msmoe or diversify writes"
    )
    group.add_argument(
        "--checkpoint", metavar="DIR", help="average these 16-bit weights, not those of the store"
    )
    group.add_argument(
        "--router",
        choices=ROUTERS,
        help="index-map: all rows stay (uncurl, msmoe); merged: averaged rows (diversify); "
        "untrained: random ones, in a checkpoint to be trained (uncurl)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the clustering")


def run(path: Path, args: argparse.Namespace) -> int:
    """Print the plan of a merge, then write the store."""
    from ..quant.merge import router_of

    router = router_of(args.method, args.router)
    _check(args)
    if args.keep_first_layer is None:  # a checkpoint has as many experts in every layer
        args.keep_first_layer = router != "untrained"
    target = None if args.out is None else Path(args.out)
    if target is not None and not args.dry_run:
        from ..quant.journal import check_target

        check_target(target)
    with ExitStack() as stack:
        return _merge(path, target, router, args, stack)


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that are of sets only, or that lack something."""
    for name, value in (("--fit", args.fit), ("--trace", args.trace), ("--name", args.name)):
        if value is not None:
            raise UsageError(
                f"`{name}` does not go with `--method {args.method}`",
                "it is about a set",
            )
    if args.across:
        raise UsageError(
            f"`--global` does not go with `--method {args.method}`",
            "msmoe lets layers differ by itself, the others keep as many of each",
        )
    if args.out is None and not args.dry_run:
        raise UsageError("merged experts need a store of their own", "", "--out NAME.edgemoe")
    if args.router == "untrained" and args.checkpoint is None:
        raise UsageError(
            "random routers are for training, which starts from 16 bits",
            "a store cannot be trained",
            "--checkpoint DIR; --out then is a checkpoint as well",
        )
    if args.method == "diversify" and not args.text:
        raise UsageError(
            "`--method diversify` needs a text",
            "it compares what all experts make of the same tokens",
            "--text FILE",
        )


def _merge(
    path: Path, target: Path | None, router: str, args: argparse.Namespace, stack: ExitStack
) -> int:
    from ..active_set import owner_of
    from ..models import store_args
    from ..quant.merge import choose_groups, logit_similarities
    from ..quant.merge_outputs import routes_and_inputs
    from ..quant.merge_plan import make_merge_plan
    from ..quant.progress import open_progress
    from ..quant.prune import Amount
    from ..runtime.index import load_index

    index = load_index(path)
    if index.is_derived:
        raise UsageError(
            f"`{path}` was made of a pruned set, or by merging", "", "merge the full store"
        )
    owner = owner_of(index, store_args(index))
    engine, texts = prune_task.open_text(path, args, stack) if args.text else (None, [])
    progress = open_progress()
    stack.callback(progress.close)
    profile = prune_task.profile(path, args, engine, texts, owner)
    routes = None
    if engine is None:
        alike = logit_similarities(profile)
    else:
        routes, inputs = routes_and_inputs(engine, texts, args.method == "diversify")
        alike = _similarities(path, args, profile, inputs, progress)
    amount = Amount(args.keep, args.experts, keep_first=args.keep_first_layer)
    merge = choose_groups(args.method, profile, alike, owner.top_k, amount, args.seed)
    rows = _rows(args, index, profile, merge, routes)
    plan = make_merge_plan(
        merge, profile, index, args.method, router, *rows, keeps_first=args.keep_first_layer
    )
    stack.close()  # the engine's memory, before bodies take theirs
    _say(plan, merge, target, args)
    if target is None or args.dry_run:
        return 0
    return _write(path, target, router, merge, profile, args)


def _similarities(
    path: Path,
    args: argparse.Namespace,
    profile: "Profile",
    inputs: "dict[int, Tensor]",
    progress: "Progress",
) -> "Similarities":
    from ..quant.merge import logit_similarities
    from ..quant.merge_outputs import output_similarities
    from ..quant.store_source import open_source

    if args.method != "diversify":
        return logit_similarities(profile)
    with open_source(args.checkpoint or path) as source:
        return output_similarities(source, inputs, progress)


def _rows(
    args: argparse.Namespace,
    index: "StoreIndex",
    profile: "Profile",
    merge: "Merge",
    routes: "np.ndarray | None",
) -> "tuple[list[BudgetRow], str]":
    from ..quant.merge_plan import counted_merge_rows, replayed_merge_rows

    sizes = prune_task.cache_sizes(args, index, profile)
    if routes is None:
        rows = counted_merge_rows(profile, merge, index, sizes)
        return rows, "the most picked experts staying in it"
    rows = replayed_merge_rows(routes, merge, index, sizes)
    return rows, f"by replay of {len(routes)} tokens of the text"


def _say(plan: "MergePlan", merge: "Merge", target: Path | None, args: argparse.Namespace) -> None:
    from ..quant.merge_plan import merge_plan_text

    if args.json:
        groups = {layer: [group.members for group in each.groups] for layer, each in merge.items()}
        document = asdict(plan) | {"out": None if target is None else str(target)}
        print(json.dumps(document | {"groups": groups}, indent=1), flush=True)
    else:
        print("\n".join(merge_plan_text(plan)), flush=True)
    for line in plan.warnings:
        note(f"warning: {line}")


def _write(
    path: Path,
    target: Path,
    router: str,
    merge: "Merge",
    profile: "Profile",
    args: argparse.Namespace,
) -> int:
    from ..quant.convert import num_cpus
    from ..quant.merge_export import export_merged
    from ..quant.merge_write import write_merged
    from ..quant.progress import open_progress

    provenance = {
        "method": args.method,
        "keep": args.keep,
        "experts": args.experts,
        "keep_first_layer": args.keep_first_layer,
        "seed": args.seed,
        "bodies": "checkpoint" if args.checkpoint else "store",
        "fingerprint": profile.fingerprint,
        "profile": profile.name,
        "tokens": profile.num_tokens,
        "texts": profile.texts,
    }
    progress = open_progress()
    try:
        if router == "untrained":
            export_merged(args.checkpoint, merge, target, args.seed, progress)
            note(
                f"wrote {target}, a checkpoint whose routers are random: train it, then convert it"
            )
            return 0
        made = write_merged(
            path,
            merge,
            target,
            router=router,
            checkpoint=args.checkpoint,
            provenance={k: v for k, v in provenance.items() if v not in (None, False, [])},
            progress=progress,
            num_threads=args.threads or num_cpus(),
        )
    finally:
        progress.close()
    count, size = len(made.records), format_bytes(made.expert_bytes)
    note(f"wrote {target}: {count} experts, {size}")
    return 0
