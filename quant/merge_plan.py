"""What a merge would give and cost, printed before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..runtime.amounts import format_bytes
from ..runtime.index import ExpertRecord, StoreIndex
from ..runtime.profile import Profile
from .factoring import Factoring
from .merge import Merge
from .merge_records import merged_layouts
from .prune_plan import BudgetRow, LayerPlan, columns, replayed_rows, rows_text, warnings_on
from .prune_replay import NOBODY, pick_share_in_memory

UNTRAINED = (
    "merged experts were made for training afterwards; without it, leaving experts out usually "
    "costs less (docs/sets.md): compare with --method reap"
)
FIRST_LAYER = (
    "the first MoE layer is merged too: UNCURL's authors saw no groups of like experts in it, and "
    "the demo model lost most there (docs/sets.md)"
)


@dataclass(frozen=True, slots=True)
class LayerMergePlan:
    """One layer. `moved_pick_share`: of the picks, those of experts merged into another."""

    layer: int
    num_experts: int
    num_merged: int  # experts that are left
    largest_group: int
    moved_pick_share: float


@dataclass(frozen=True, slots=True)
class FactorPlan:
    """How the bodies of all layers but `whole_layers` are stored; bytes of the largest."""

    dense: int
    num_neurons: int
    rank: int
    record_bytes: int
    whole_record_bytes: int
    whole_layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything `prune` says of a merge before it is written."""

    method: str
    router: str
    factors: FactorPlan | None
    layers: tuple[LayerMergePlan, ...]
    expert_bytes: int
    merged_bytes: int
    num_experts: int
    num_merged: int
    moved_pick_share: float
    rows: tuple[BudgetRow, ...]
    rows_from: str
    warnings: tuple[str, ...]


def make_merge_plan(
    merge: Merge,
    profile: Profile,
    index: StoreIndex,
    method: str,
    router: str,
    rows: Sequence[BudgetRow] = (),
    rows_from: str = "",
    keeps_first: bool = False,
    factoring: Factoring | None = None,
) -> MergePlan:
    """The plan of a merge of the experts of a store."""
    layers = []
    for layer, each in merge.items():
        hard, heads = profile.layers[layer].hard_count, list(each.heads)
        layers.append(
            LayerMergePlan(
                layer,
                each.num_experts,
                len(heads),
                max(len(group.members) for group in each.groups),
                1 - float(hard[heads].sum()) / max(int(hard.sum()), 1),
            )
        )
    counts = [LayerPlan(each.layer, each.num_experts, each.num_merged, 0, 0) for each in layers]
    warnings = [UNTRAINED, *warnings_on(counts, profile.top_k)]
    if not keeps_first:
        warnings.insert(1, FIRST_LAYER)
    return MergePlan(
        method=method,
        router=router,
        factors=None if factoring is None else _factor_plan(index, factoring),
        layers=tuple(layers),
        expert_bytes=index.expert_bytes,
        merged_bytes=merged_index(index, merge, factoring).expert_bytes,
        num_experts=len(index.records),
        num_merged=sum(each.num_merged for each in layers),
        moved_pick_share=float(np.mean([each.moved_pick_share for each in layers])),
        rows=tuple(rows),
        rows_from=rows_from,
        warnings=tuple(warnings),
    )


def merged_routes(routes: NDArray[np.integer], merge: Merge) -> NDArray[np.int64]:
    """Routes [T, places, K] of the full model by the numbers of the merged experts, each once,
    ascending, then -1."""
    result = np.full(routes.shape, NOBODY, dtype=np.int64)
    for place, each in enumerate(merge.values()):
        ids, last = routes[:, place].astype(np.int64), len(each.groups)
        mapped = np.where(ids < 0, last, np.array(each.bodies)[np.maximum(ids, 0)])
        mapped.sort(axis=1)
        mapped[:, 1:][mapped[:, 1:] == mapped[:, :-1]] = last
        mapped.sort(axis=1)
        result[:, place] = np.where(mapped == last, NOBODY, mapped)
    return result


def _factor_plan(index: StoreIndex, factoring: Factoring) -> FactorPlan:
    whole = max((r.layout for r in index.records.values()), key=lambda layout: layout.num_bytes)
    return FactorPlan(
        factoring.dense,
        whole.width,
        factoring.rank,
        factoring.layout(-1, whole).num_bytes,
        whole.num_bytes,
        tuple(sorted(factoring.whole_layers)),
    )


def merged_index(index: StoreIndex, merge: Merge, factoring: Factoring | None = None) -> StoreIndex:
    """The records that the store will have; their places in the file are not known yet."""
    layouts = merged_layouts(index, merge, factoring)
    records = {key: ExpertRecord(0, layout, (0, 0)) for key, layout in layouts.items()}
    return replace(index, records=records)


def replayed_merge_rows(
    routes: NDArray[np.integer],
    merge: Merge,
    index: StoreIndex,
    merged: StoreIndex,
    cache_sizes: Sequence[int],
) -> list[BudgetRow]:
    """Full and merged store decoding the same recorded choices [T, places, K], token by token, in
    caches of these sizes, which are empty at first. What routers choose behind a merged layer will
    differ a little."""
    return replayed_rows(routes, merged_routes(routes, merge), index, cache_sizes, merged)


def counted_merge_rows(
    profile: Profile,
    merge: Merge,
    index: StoreIndex,
    merged: StoreIndex,
    cache_sizes: Sequence[int],
) -> list[BudgetRow]:
    """The same from counts alone: hits where the most picked experts stay in memory for good."""
    both: list[tuple[list[NDArray[np.float64]], list[int], float]] = []
    for is_merged, of in ((False, index), (True, merged)):
        shares, cycle = [], 0.0
        for layer, each in merge.items():
            counts = profile.layers[layer].hard_count.astype(np.float64)
            if is_merged:
                counts = np.bincount(each.bodies, counts)
            shares.append(counts / max(counts.sum(), 1))
            sizes = [of.records[layer, e].num_bytes for e in range(len(counts))]
            cycle += profile.top_k * float(np.mean(sizes))
        both.append((shares, [r.num_bytes for _, r in sorted(of.records.items())], cycle))
    rows = []
    for cache_bytes in cache_sizes:
        rates = [pick_share_in_memory(shares, sizes, cache_bytes) for shares, sizes, _ in both]
        reads = [(1 - rate) * cycle for rate, (_, _, cycle) in zip(rates, both, strict=True)]
        rows.append(BudgetRow(cache_bytes, cache_bytes / index.expert_bytes, *rates, *reads))
    return rows


def merge_plan_text(plan: MergePlan) -> list[str]:
    """The plan as lines of text, without the warnings."""
    words = {
        "index-map": "all rows of the routers stay and name the expert they were merged into "
        "(not UNCURL's router)",
        "merged": "the rows of the routers are merged like the experts",
        "untrained": "the routers are new and random: the store cannot run before they are trained",
    }
    lines = [
        f"merges {plan.num_experts} experts into {plan.num_merged}, "
        f"{format_bytes(plan.expert_bytes)} into {format_bytes(plan.merged_bytes)}",
        f"{100 * plan.moved_pick_share:.1f} % of the picks are of experts that are merged into "
        "another",
        words[plan.router],
    ]
    if plan.factors is not None:
        each = plan.factors
        but = f" but those of layer {each.whole_layers[0]}" if each.whole_layers else ""
        lines.append(
            f"all experts{but} keep {each.dense} of {each.num_neurons} neurons as they are, the "
            f"others as products of rank {each.rank}: {format_bytes(each.record_bytes)} each, "
            f"{format_bytes(each.whole_record_bytes)} whole"
        )
    header = ("layer", "experts", "of", "largest group", "picks that move")
    cells = [
        (
            str(each.layer),
            str(each.num_merged),
            str(each.num_experts),
            str(each.largest_group),
            f"{100 * each.moved_pick_share:.1f} %",
        )
        for each in plan.layers
    ]
    return lines + columns(header, cells) + rows_text(plan.rows, plan.rows_from, "merged")
