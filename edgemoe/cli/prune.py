"""`edgemoe prune STORE`: choose the experts that a task needs, as a set beside the store."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from . import options
from .render import note, open_output

if TYPE_CHECKING:
    from ..quant.prune import Amount, Kept
    from ..quant.prune_plan import BudgetRow
    from ..runtime.index import StoreIndex
    from ..runtime.profile import Profile

METHODS = ("reap", "frequency", "soft-count")
EPILOG = """A set is a small file, STORE/sets/NAME.json; no weight changes. The plan is printed
first. What it costs on your text: edgemoe eval STORE STORE --set NAME --set-mode hard --text FILE

  edgemoe prune NAME.edgemoe --profile code --keep 50% --name code
  edgemoe prune NAME.edgemoe --text code.txt --fit 4GiB --name code
  edgemoe prune NAME.edgemoe --set code --compact code.edgemoe
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--name", metavar="NAME", help="of the set")
    parser.add_argument("--method", choices=METHODS, default="reap", help="default: reap")
    group = parser.add_argument_group("what stays")
    group.add_argument("--keep", type=_share, metavar="SHARE", help="of every layer, such as 50%%")
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
        "--keep-first-layer", action="store_true", help="all of the first MoE layer, besides"
    )
    group = parser.add_argument_group("what is known of the task")
    group.add_argument(
        "--profile",
        metavar="NAME",
        help="of edgemoe calibrate --name NAME, or a file (default: the store's own profile)",
    )
    group.add_argument("--trace", metavar="FILE", help="replay this routing, for the hit rates")
    group.add_argument(
        "--caches",
        type=options.word_list,
        metavar="LIST",
        help="expert caches to plan for: sizes, or percentages of all experts "
        "(default: 12.5%%,25%%,50%%)",
    )
    group = parser.add_argument_group("memory, for --fit")
    group.add_argument("--context", type=options.count, metavar="N", help="tokens of the KV cache")
    group.add_argument("--kv-bits", type=int, choices=(8, 16, 32), default=16, help="default: 16")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--force", action="store_true", help="replace a set of this name")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_path(args) or options.bundled_model())
    amounts = [value for value in (args.keep, args.experts, args.fit) if value is not None]
    if len(amounts) != 1:
        raise UsageError("how much stays?", "expected one of --keep, --experts, --fit")
    from ..runtime.sets import check_name, save_set, set_path

    if args.name is None:
        raise UsageError("the set needs a name", "", "--name NAME")
    target = set_path(path, check_name(args.name))
    if target.exists() and not (args.force or args.dry_run):
        raise UsageError(
            f"there is a set `{args.name}` already", str(target), "--force replaces it"
        )
    open_output()
    from ..active_set import owner_of
    from ..models import parse_config
    from ..quant.prune import choose, scores_of
    from ..quant.prune_plan import make_plan, plan_text
    from ..runtime.index import load_index
    from ..runtime.sets import ExpertSet

    index = load_index(path)
    owner = owner_of(index, parse_config(index.config))
    profile = _profile(path, args)
    check_profile(profile, owner)
    scores = scores_of(profile, args.method)
    kept = choose(scores, index, owner.top_k, _amount(index, args), not args.across)
    plan = make_plan(kept, scores, profile, index, *_rows(args, index, profile, kept))
    parameters = {
        "keep": args.keep,
        "experts": args.experts,
        "fit_bytes": args.fit,
        "across_layers": args.across,
        "keep_first_layer": args.keep_first_layer,
        "profile": profile.name or "the store's own",
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
    if args.json:
        document = asdict(plan) | {"name": args.name, "method": args.method, "kept": kept}
        print(json.dumps(document, indent=1), flush=True)
    else:
        print("\n".join(plan_text(plan)), flush=True)
    for line in plan.warnings:
        note(f"warning: {line}")
    if not args.dry_run:
        save_set(path, expert_set)
        note(f"wrote {target}; use it with --set {args.name} --set-mode hard")
    return 0


def check_profile(profile: "Profile", owner: Any) -> None:
    """Raises UsageError where the profile is of another model, checkpoint or tokenizer."""
    profile.check_model(owner.num_experts, owner.top_k)
    if profile.fingerprint and profile.fingerprint != owner.fingerprint:
        raise UsageError(
            "this profile belongs to another checkpoint",
            f"its fingerprint is {profile.fingerprint}, that of this store {owner.fingerprint}",
            "calibrate this store",
        )
    if profile.tokenizer != (owner.tokenizer_sha256 or ""):
        raise UsageError(
            "this profile was made with another tokenizer",
            f"sha256 {profile.tokenizer or 'none'}, that of this store {owner.tokenizer_sha256}",
            "calibrate this store",
        )
    if not profile.num_tokens:
        raise UsageError("this profile is empty", "it has counted no token", "calibrate again")


def _share(text: str) -> float:
    """`50%` or `0.5` as 0.5."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 50%, got `{text}`")
    return value


def _profile(path: Path, args: argparse.Namespace) -> "Profile":
    from ..runtime.profile import Profile, profile_path

    if args.profile is not None and args.profile.endswith(".safetensors"):
        return Profile.load(args.profile)
    return Profile.load(profile_path(path, args.profile))


def _amount(index: "StoreIndex", args: argparse.Namespace) -> "Amount":
    from ..quant.prune import Amount
    from .plan import store_plan

    if args.fit is None:
        return Amount(args.keep, args.experts, keep_first=args.keep_first_layer)
    plan = store_plan(index, args.fit, args.context, args.kv_bits)
    if plan.is_resident:
        note("note: all experts fit into this budget; nothing has to go")
    return Amount(num_bytes=plan.cache_bytes, keep_first=args.keep_first_layer)


def _shares(counts: Any, ids: tuple[int, ...]) -> tuple[float, ...]:
    total = max(int(counts.sum()), 1)
    return tuple(float(counts[expert]) / total for expert in ids)


def _rows(
    args: argparse.Namespace, index: "StoreIndex", profile: "Profile", kept: "Kept"
) -> tuple[list["BudgetRow"], str]:
    """What is expected of expert caches, and from what."""
    from ..quant.prune_plan import counted_rows, replayed_rows

    sizes = [_cache_bytes(word, index) for word in args.caches or ("12.5%", "25%", "50%")]
    least = profile.top_k * index.max_record_bytes
    sizes = [size for size in sizes if size >= least]
    if args.trace is None:
        return counted_rows(profile, kept, index, sizes), "the most picked experts staying in it"
    from ..quant.prune_replay import redirect
    from ..runtime.trace import Trace

    trace = Trace.load(options.existing(args.trace, "a trace", "edgemoe trace record makes one"))
    if trace.num_experts.tolist() != list(index.layer_to_num_experts.values()):
        raise UsageError(f"`{args.trace}` is a routing of another model", "other layers or experts")
    weights = {layer: profile.layers[layer].hard_count.astype(float) for layer in kept}
    pruned = redirect(trace.experts, kept, weights)
    return replayed_rows(trace.experts, pruned, index, sizes), "by replay, lost picks drawn anew"


def _cache_bytes(word: str, index: "StoreIndex") -> int:
    if not word.endswith("%"):
        return options.size(word)
    try:
        return int(index.expert_bytes * _share(word))
    except argparse.ArgumentTypeError as error:
        raise UsageError("bad option `--caches`", str(error)) from error
