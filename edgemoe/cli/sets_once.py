"""What `bench --sets` measures once: losses, answers, and what caches of several sizes would read.

None of it depends on the budget. The sets of a store share one engine; another store, or one
with other routes, is opened beside it, since the distance is measured token by token.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .render import note
from .sets_arms import Arm
from .sets_speed import Budget, engine_options

if TYPE_CHECKING:
    from ..engine import Engine
    from ..quant.answers import Answered, Conversation
    from ..quant.masked import Masked
    from ..routing import Routing
    from ..runtime.index import StoreIndex

CURVE = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)  # caches, as shares of the full model's experts
MAX_CONTEXT = 2048  # of conversations
Rows = dict[str, dict[str, Any]]


def measure_once(
    arms: list[Arm],
    rows: Rows,
    texts: dict[str, list[int]],
    conversations: "list[Conversation]",
    budget: Budget,
    args: argparse.Namespace,
) -> None:
    """Fill in `losses`, `removed_picks`, `curve` and `answers` of every arm's row."""
    from ..quant import evaluate  # noqa: F401  # torch, while the engine's plan can still count it
    from ..quant.masked import Masked

    full = arms[0].index
    sizes = sorted({budget.cache_bytes, *(int(share * full.expert_bytes) for share in CURVE)})
    with _open(full, budget, args) as base:
        first = Masked(base, None)
        for name, ids in texts.items():
            routes = first.routes(_windows(base, ids[: args.curve_tokens]))
            for arm in arms:
                rows[arm.name].setdefault("removed_picks", {})[name] = removed(routes, arm.kept)
        own = [arm for arm in arms if arm.path == arms[0].path and arm.routing is None]
        reference = _answers(base, None, conversations, arms[0].name)
        for arm, model in _models(base, own):
            _curve(rows[arm.name], model, base, texts["text"], sizes, args)
            held = reference if arm.active is None else _answers(base, arm, conversations, arm.name)
            _score(rows[arm.name], conversations, held, reference)
        _losses(rows, first, _models(base, own)[1:], texts, base, args)
        for arm in arms[len(own) :]:
            with _open(arm.index, budget, args, arm.routing) as engine:
                pairs = _models(engine, [arm])
                _losses(rows, first, pairs, texts, engine, args)
                _curve(rows[arm.name], pairs[0][1], engine, texts["text"], sizes, args)
                held = _answers(engine, None, conversations, arm.name)
                _score(rows[arm.name], conversations, held, reference)


def _open(
    index: "StoreIndex",
    budget: Budget,
    args: argparse.Namespace,
    routing: "Routing | None" = None,
) -> "Engine":
    """An engine for windows and conversations, with the arms' expert cache but no other bound."""
    from ..engine import Engine
    from ..models import parse_config

    context = min(parse_config(index.config).max_context, MAX_CONTEXT)
    options = engine_options(context, args) | {"cache_bytes": budget.cache_bytes}
    return Engine.from_pretrained(index.path, routing=routing, **options)


def _models(engine: "Engine", arms: Sequence[Arm]) -> "list[tuple[Arm, Masked]]":
    from ..quant.masked import Masked

    return [(arm, Masked(engine, arm.active)) for arm in arms]


def _windows(engine: "Engine", ids: Sequence[int]) -> list[list[int]]:
    from ..quant.windows import WINDOW_TOKENS, cut

    size = min(WINDOW_TOKENS, engine.context)
    return [window.ids for window in cut(ids, size)]


def _losses(
    rows: Rows,
    first: "Masked",
    pairs: "list[tuple[Arm, Masked]]",
    texts: dict[str, list[int]],
    engine: "Engine",
    args: argparse.Namespace,
) -> None:
    """Perplexity of each text, and the distance from the full model's distribution."""
    from ..quant.evaluate import Figures, compare
    from ..quant.progress import open_progress
    from ..quant.windows import WINDOW_TOKENS, cut

    for name, ids in texts.items():
        size = min(WINDOW_TOKENS, engine.context)
        windows = cut(ids[: args.eval_tokens], size, max(1, size // 2))
        progress = open_progress()
        try:
            models = [model for _, model in pairs]
            reference, *found = compare(first, models, windows, progress, args.kv_bits)
        finally:
            progress.close()
        rows[next(iter(rows))].setdefault("losses", {})[name] = asdict(Figures.of(reference))
        for (arm, _), losses in zip(pairs, found, strict=True):
            rows[arm.name].setdefault("losses", {})[name] = asdict(Figures.of(losses))


def removed(routes: NDArray[np.integer], kept: dict[int, Any] | None) -> float | None:
    """Share of the picks `routes` [T, places, K], -1 for none, that go to experts that do not stay.
    `kept` by layer, in the order of the places."""
    if kept is None:
        return None
    lost = total = 0
    for place, (_, ids) in enumerate(sorted(kept.items())):
        picks = routes[:, place][routes[:, place] >= 0]
        lost += int(np.isin(picks, ids, invert=True).sum())
        total += picks.size
    return lost / max(1, total)


def _curve(
    row: dict[str, Any],
    model: "Masked",
    engine: "Engine",
    ids: Sequence[int],
    sizes: Sequence[int],
    args: argparse.Namespace,
) -> None:
    """The arm's own routing of the text, decoded token by token, in caches of several sizes."""
    from ..quant.prune_plan import trace_of
    from ..runtime.replay import Demand, replay

    note(f"replay: {row['arm']}")
    routes = model.routes(_windows(engine, ids[: args.curve_tokens]))
    demand = Demand(trace_of(routes, engine._index))
    row["curve"] = [
        {
            "bytes": each.capacity_bytes,
            "hit_rate": each.hit_rate,
            "bytes_per_token": each.bytes_per_token,
        }
        for each in replay(demand, args.policy, sizes)
    ]


def _answers(
    engine: "Engine", arm: Arm | None, conversations: "list[Conversation]", name: str
) -> "list[Answered]":
    """The conversations as the arm holds them; afterwards the engine is the full model again."""
    from ..quant.answers import hold
    from ..session import Session

    if not conversations:
        return []
    note(f"questions: {name}")
    active = None if arm is None else arm.active
    if active is not None:
        engine.use_set(*(arm.options[name] for name in ("set", "set_mode", "set_threshold")))
    try:
        with Session(engine) as session:
            return hold(session, conversations)
    finally:
        engine.use_set(None)


def _score(
    row: dict[str, Any],
    conversations: "list[Conversation]",
    held: "list[Answered]",
    reference: "list[Answered]",
) -> None:
    from ..quant.answers import score

    row["answers"] = None
    if conversations:
        row["answers"] = asdict(score(conversations, held, reference))
        row["answers"]["texts"] = [list(each.answers) for each in held]
