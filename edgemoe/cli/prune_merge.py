"""`edgemoe prune STORE --method msmoe --out OUT`, and others: a store of merged experts."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from . import options, prune_task
from .render import note

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..quant.factoring import Factoring
    from ..quant.merge import Merge, Similarities
    from ..quant.merge_plan import MergePlan
    from ..quant.progress import Progress
    from ..quant.prune_plan import BudgetRow
    from ..runtime.index import StoreIndex
    from ..runtime.profile import Profile

METHODS = ("uncurl", "msmoe", "mc-smoe", "diversify")
FACTOR_OPTIONS = ("--rank", "--dense-neurons", "--body-size")
ROUTERS = ("index-map", "merged", "untrained")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("experts merged, in a new store")
    group.add_argument("--out", metavar="OUT", help="the store that such a method writes")
    group.add_argument(
        "--checkpoint", metavar="DIR", help="average these 16-bit weights, not those of the store"
    )
    group.add_argument(
        "--router",
        choices=ROUTERS,
        help="index-map: all rows stay (all but diversify); merged: averaged rows (diversify); "
        "untrained: random ones, in a checkpoint to be trained (uncurl)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the clustering")
    group = parser.add_argument_group("factored bodies, of --method mc-smoe")
    group.add_argument(
        "--rank",
        type=_number_or_share,
        metavar="N",
        help="of the factors: a number, or a share of the smaller side such as 25%% (default: 32)",
    )
    group.add_argument(
        "--dense-neurons",
        type=prune_task.share,
        metavar="SHARE",
        help="stored as they are, not as factors (default: 10%%, up to a multiple of 32)",
    )
    group.add_argument(
        "--body-size",
        type=_size_or_share,
        metavar="SIZE",
        help="instead of --rank: the largest whose bodies take no more than this, or than a share "
        "of what they take whole, such as 50%%",
    )


def _number_or_share(text: str) -> int | float:
    return prune_task.share(text) if text.endswith("%") else options.count(text)


def _size_or_share(text: str) -> int | float:
    return prune_task.share(text) if text.endswith("%") else options.size(text)


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
    for name in FACTOR_OPTIONS if args.method != "mc-smoe" else ():
        if getattr(args, name[2:].replace("-", "_")) is not None:
            raise UsageError(
                f"`{name}` does not go with `--method {args.method}`", "it is of mc-smoe"
            )
    if args.rank is not None and args.body_size is not None:
        raise UsageError("`--rank` and `--body-size` are two ways to say one thing", "", "give one")
    for name, value in (("--fit", args.fit), ("--trace", args.trace), ("--name", args.name)):
        if value is not None:
            raise UsageError(
                f"`{name}` does not go with `--method {args.method}`",
                "it is about a set",
            )
    if args.across:
        raise UsageError(
            f"`--global` does not go with `--method {args.method}`",
            "msmoe and mc-smoe let layers differ by themselves, others keep as many of each",
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
    from ..quant.merge import choose_groups, kept_whole, logit_similarities
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
    model = store_args(index)
    whole = kept_whole(router, model.hash_layers)
    owner = owner_of(index, model)
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
    amount = Amount(args.keep, args.experts, keep_first=args.keep_first_layer, whole=whole)
    merge = choose_groups(args.method, profile, alike, owner.top_k, amount, args.seed)
    factoring = _factoring(args, index)
    rows = _rows(args, index, profile, merge, factoring, routes)
    plan = make_merge_plan(
        merge,
        profile,
        index,
        args.method,
        router,
        *rows,
        keeps_first=args.keep_first_layer,
        factoring=factoring,
    )
    stack.close()  # the engine's memory, before bodies take theirs
    _say(plan, merge, target, args)
    if target is None or args.dry_run:
        return 0
    return _write(path, target, router, merge, factoring, profile, args)


def _factoring(args: argparse.Namespace, index: "StoreIndex") -> "Factoring | None":
    if args.method != "mc-smoe":
        return None
    from ..quant.factoring import choose_factoring

    layouts = [record.layout for record in index.records.values()]
    first = min(layer for layer, _ in index.records)
    return choose_factoring(
        max(layouts, key=lambda layout: layout.num_bytes),
        args.rank,
        args.dense_neurons,
        args.body_size,
        frozenset({first} if args.keep_first_layer else ()),
    )


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
    factoring: "Factoring | None",
    routes: "np.ndarray | None",
) -> "tuple[list[BudgetRow], str]":
    from ..quant.merge_plan import counted_merge_rows, merged_index, replayed_merge_rows
    from ..quant.prune_plan import tokens_to_replay

    merged = merged_index(index, merge, factoring)
    sizes = prune_task.cache_sizes(args, index, profile)
    if routes is None:
        rows = counted_merge_rows(profile, merge, index, merged, sizes)
        return rows, "the most picked experts staying in it"
    routes = routes[: tokens_to_replay(routes.shape[1])]
    rows = replayed_merge_rows(routes, merge, index, merged, sizes)
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
    factoring: "Factoring | None",
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
        "rank": None if factoring is None else factoring.rank,
        "dense_neurons": None if factoring is None else factoring.dense,
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
            factoring=factoring,
            profile=profile,
            provenance={k: v for k, v in provenance.items() if v not in (None, False, [])},
            progress=progress,
            num_threads=args.threads or num_cpus(),
        )
    finally:
        progress.close()
    count, size = len(made.records), format_bytes(made.expert_bytes)
    note(f"wrote {target}: {count} experts, {size}")
    return 0
