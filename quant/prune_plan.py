"""What a pruned set would cost and save, printed before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.amounts import format_bytes
from ..runtime.index import StoreIndex
from ..runtime.policy import DEFAULT_POLICY
from ..runtime.profile import Profile
from ..runtime.replay import Demand, replay
from ..runtime.trace import DECODE, Trace
from .prune import Kept, Scores
from .prune_replay import pick_share_in_memory

_MAX_TOKENS, _MAX_LAYERS = 1024, 12 * 1024  # to replay: tokens, and layers of them together
SAFE_PER_TOP_K = 8  # experts per active one that quality was seen to need (Mesh-LLM/mesh-llm#1236)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer. Shares are of the profile's picks, and of the method's scores, that go."""

    layer: int
    num_experts: int
    num_kept: int
    removed_pick_share: float
    removed_score_share: float


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """Full model and set in an expert cache of the same size. Rates None: not known."""

    cache_bytes: int
    share: float  # of all experts
    full_hit_rate: float
    set_hit_rate: float
    full_bytes_per_token: float
    set_bytes_per_token: float


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Everything `prune` says of a set before it is written."""

    layers: tuple[LayerPlan, ...]
    expert_bytes: int
    kept_bytes: int
    num_experts: int
    num_kept: int
    removed_pick_share: float
    removed_score_share: float
    rows: tuple[BudgetRow, ...]
    rows_from: str  # what the rows were computed from
    warnings: tuple[str, ...] = field(default=())


def make_plan(
    kept: Kept,
    scores: Scores,
    profile: Profile,
    index: StoreIndex,
    rows: Sequence[BudgetRow] = (),
    rows_from: str = "",
) -> PrunePlan:
    """The plan of a set that keeps `kept`."""
    layers = []
    for layer, ids in kept.items():
        hard, values = profile.layers[layer].hard_count, scores[layer]
        layers.append(
            LayerPlan(
                layer,
                len(values),
                len(ids),
                _lost_share(hard, ids),
                _lost_share(values, ids),
            )
        )
    pairs = [(layer, expert) for layer, ids in kept.items() for expert in ids]
    return PrunePlan(
        layers=tuple(layers),
        expert_bytes=index.expert_bytes,
        kept_bytes=sum(index.records[pair].num_bytes for pair in pairs),
        num_experts=len(index.records),
        num_kept=len(pairs),
        removed_pick_share=float(np.mean([each.removed_pick_share for each in layers])),
        removed_score_share=float(np.mean([each.removed_score_share for each in layers])),
        rows=tuple(rows),
        rows_from=rows_from,
        warnings=tuple(warnings_on(layers, profile.top_k)),
    )


def _lost_share(values: NDArray[Any], kept: Sequence[int]) -> float:
    total = float(values.sum())
    return 1.0 - float(values[list(kept)].sum()) / total if total > 0 else 0.0


def warnings_on(layers: Sequence[LayerPlan], top_k: int) -> list[str]:
    """Where other models were seen to break: UNCURL's factors (2409.01483), and 8 x top-k."""
    found = []
    for limit, is_meant in ((4, lambda e: e < 64), (2, lambda e: e >= 64)):
        over = [
            each.layer
            for each in layers
            if is_meant(each.num_experts) and each.num_experts > limit * each.num_kept
        ]
        if over:
            found.append(
                f"{_layers(over)}: fewer than 1 in {limit} experts stay; models with as many did "
                "worse than small ones beyond that, even when trained again"
            )
    few = [
        each.layer
        for each in layers
        if each.num_kept < min(SAFE_PER_TOP_K * top_k, each.num_experts)
    ]
    if few:
        found.append(
            f"{_layers(few)}: fewer than {SAFE_PER_TOP_K} x {top_k} experts stay, below which "
            "answers were seen to suffer: measure with edgemoe eval"
        )
    return found


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) > 6:
        return f"{len(numbers)} layers"
    return ("layer " if len(numbers) == 1 else "layers ") + ", ".join(map(str, numbers))


def tokens_to_replay(num_layers: int) -> int:
    """Of a text: as many as take some seconds."""
    return max(1, min(_MAX_TOKENS, _MAX_LAYERS // num_layers))


def replayed_rows(
    full: NDArray[np.integer],
    fewer: NDArray[np.integer],
    index: StoreIndex,
    cache_sizes: Sequence[int],
    fewer_index: StoreIndex | None = None,
) -> list[BudgetRow]:
    """Routings [T, places, K], -1 for none, of the full model and of a set or a merged store
    (`fewer_index`), decoded token by token in caches of these sizes, which are empty at first."""
    full_runs, fewer_runs = (
        replay(Demand(trace_of(routes, of)), DEFAULT_POLICY, cache_sizes)
        for routes, of in ((full, index), (fewer, fewer_index or index))
    )
    return [
        BudgetRow(
            run.capacity_bytes,
            run.capacity_bytes / index.expert_bytes,
            run.hit_rate,
            other.hit_rate,
            run.bytes_per_token,
            other.bytes_per_token,
        )
        for run, other in zip(full_runs, fewer_runs, strict=True)
    ]


def trace_of(routes: NDArray[np.integer], index: StoreIndex) -> Trace:
    """Routes [T, places, K] of a store as decoded steps."""
    sizes = [record.num_bytes for _, record in sorted(index.records.items())]
    num_experts = np.array(list(index.layer_to_num_experts.values()))
    first = np.concatenate(([0], np.cumsum(num_experts)[:-1]))
    return Trace(
        experts=routes.astype(np.int32),
        weights=None,
        phase=np.full(len(routes), DECODE, dtype=np.int8),
        num_experts=num_experts,
        expert_bytes=np.maximum.reduceat(sizes, first),
        record_bytes=np.array(sizes),
    )


def counted_rows(
    profile: Profile, kept: Kept, index: StoreIndex, cache_sizes: Sequence[int]
) -> list[BudgetRow]:
    """The same from counts alone: hits where the most picked experts stay in memory for good, and
    picks that go are spread over the others as theirs are."""
    num_bytes = [record.num_bytes for _, record in sorted(index.records.items())]
    cycle = sum(
        profile.top_k * np.mean([index.records[layer, e].num_bytes for e in range(num_experts)])
        for layer, num_experts in index.layer_to_num_experts.items()
    )
    full, pruned = [], []
    for layer, ids in kept.items():
        counts = profile.layers[layer].hard_count.astype(np.float64)
        full.append(counts / max(counts.sum(), 1))
        counts[np.isin(np.arange(len(counts)), ids, invert=True)] = 0
        pruned.append(counts / max(counts.sum(), 1))
    rows = []
    for cache_bytes in cache_sizes:
        rates = [pick_share_in_memory(each, num_bytes, cache_bytes) for each in (full, pruned)]
        reads = [(1 - rate) * float(cycle) for rate in rates]
        rows.append(BudgetRow(cache_bytes, cache_bytes / index.expert_bytes, *rates, *reads))
    return rows


def plan_text(plan: PrunePlan) -> list[str]:
    """The plan as lines of text, without the warnings."""
    saved = plan.expert_bytes - plan.kept_bytes
    lines = [
        f"keeps {plan.num_kept} of {plan.num_experts} experts, {format_bytes(plan.kept_bytes)} of "
        f"{format_bytes(plan.expert_bytes)}; {format_bytes(saved)} are never read in hard mode",
        f"{100 * plan.removed_pick_share:.1f} % of the picks go, and "
        f"{100 * plan.removed_score_share:.1f} % of the score",
    ]
    header = ("layer", "kept", "of", "picks that go", "score that goes")
    cells = [
        (
            str(each.layer),
            str(each.num_kept),
            str(each.num_experts),
            f"{100 * each.removed_pick_share:.1f} %",
            f"{100 * each.removed_score_share:.1f} %",
        )
        for each in plan.layers
    ]
    lines += columns(header, cells)
    return lines + rows_text(plan.rows, plan.rows_from, "set")


def rows_text(rows: Sequence[BudgetRow], rows_from: str, name: str) -> list[str]:
    """A table of expert caches: the full store beside the one called `name`."""
    if not rows:
        return []
    header = ("size", "of all", "hit full", f"hit {name}", "read/token full", name, "ratio")
    cells = [
        (
            format_bytes(row.cache_bytes),
            f"{100 * row.share:.0f} %",
            f"{100 * row.full_hit_rate:.1f} %",
            f"{100 * row.set_hit_rate:.1f} %",
            format_bytes(round(row.full_bytes_per_token)),
            format_bytes(round(row.set_bytes_per_token)),
            f"{row.full_bytes_per_token / row.set_bytes_per_token:.2f}"
            if row.set_bytes_per_token
            else "-",
        )
        for row in rows
    ]
    return [f"expert cache, {rows_from}:", *columns(header, cells)]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words in columns, aligned to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
