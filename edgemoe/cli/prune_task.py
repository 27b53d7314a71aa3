"""What `edgemoe prune` knows of a task: its profile, its text, a recorded routing."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import UsageError
from . import options

if TYPE_CHECKING:
    from ..engine import Engine
    from ..quant.calibrate import Text
    from ..quant.prune_plan import BudgetRow
    from ..runtime.index import StoreIndex
    from ..runtime.profile import Profile
    from ..runtime.sets import ExpertSet, SetOwner

DEFAULT_TOKENS = 50 * 1024


def share(text: str) -> float:
    """`50%` or `0.5` as 0.5."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 50%, got `{text}`")
    return value


def open_text(
    path: Path, args: argparse.Namespace, stack: ExitStack
) -> "tuple[Engine, list[Text]]":
    """An engine for the text of the task, and the text."""
    from ..engine import Engine
    from ..models import parse_config
    from ..quant.calibrate import read_texts, sums_bytes
    from ..quant.windows import WINDOW_TOKENS
    from ..runtime.index import load_index

    model = parse_config(load_index(path).config)
    given = options.engine_arguments(args) | {"context": min(WINDOW_TOKENS, model.max_context)}
    if args.memory is not None:
        given["memory"] = max(1, args.memory - sums_bytes(model))
    engine = stack.enter_context(Engine.from_pretrained(path, **given))
    return engine, read_texts(args.text, engine.tokenizer, args.tokens or DEFAULT_TOKENS)


def profile(
    path: Path,
    args: argparse.Namespace,
    engine: "Engine | None",
    texts: "list[Text]",
    owner: "SetOwner",
) -> "Profile":
    """What is known of the task: from its text, else from a file."""
    from ..runtime.profile import Profile, profile_path

    if engine is not None:
        from ..quant.progress import open_progress
        from ..quant.prune_text import profile_of_text

        progress = open_progress()
        try:
            return profile_of_text(engine, texts, owner.fingerprint, progress)
        finally:
            progress.close()
    if args.profile is not None and args.profile.endswith(".safetensors"):
        loaded = Profile.load(args.profile)
    else:
        loaded = Profile.load(profile_path(path, args.profile))
    check_profile(loaded, owner)
    return loaded


def check_profile(profile: "Profile", owner: "SetOwner") -> None:
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


def rows(
    args: argparse.Namespace,
    index: "StoreIndex",
    profile: "Profile",
    expert_set: "ExpertSet",
    engine: "Engine | None",
    texts: "list[Text]",
) -> "tuple[list[BudgetRow], str]":
    """What is expected of expert caches, and from what."""
    from ..quant.prune_plan import counted_rows, replayed_rows

    kept = dict(expert_set.kept)
    sizes = cache_sizes(args, index, profile)
    if args.trace is not None:
        from ..quant.prune_replay import redirect
        from ..runtime.trace import Trace

        trace = Trace.load(args.trace)
        if trace.num_experts.tolist() != list(index.layer_to_num_experts.values()):
            raise UsageError(
                f"`{args.trace}` is a routing of another model", "it has other layers or experts"
            )
        weights = {layer: profile.layers[layer].hard_count.astype(float) for layer in kept}
        pruned = redirect(trace.experts, kept, weights)
        found = replayed_rows(trace.experts, pruned, index, sizes)
        return found, "by replay, lost picks drawn anew"
    if engine is not None:
        from ..quant.prune_text import routes_of_text

        full, pruned = routes_of_text(engine, texts, expert_set)
        found = replayed_rows(full, pruned, index, sizes)
        return found, f"by replay of {len(full)} tokens of the text"
    return counted_rows(profile, kept, index, sizes), "the most picked experts staying in it"


def cache_sizes(args: argparse.Namespace, index: "StoreIndex", profile: "Profile") -> list[int]:
    """The bytes of the expert caches that a plan is about: those of --caches that a token fits."""
    sizes = [_cache_bytes(word, index) for word in args.caches or ("12.5%", "25%", "50%")]
    least = profile.top_k * index.max_record_bytes
    return [size for size in sizes if size >= least]


def _cache_bytes(word: str, index: "StoreIndex") -> int:
    if not word.endswith("%"):
        return options.size(word)
    try:
        return int(index.expert_bytes * share(word))
    except argparse.ArgumentTypeError as error:
        raise UsageError("bad option `--caches`", str(error)) from error
