"""The pruned set that an engine runs with: what it steers, and what it changes. Floor 3; no torch.

- exact: the output is that of the full model. The set's experts are read first and the eviction
  policy starts as if they had been in use.
- soft: the routers choose among the set's experts, and among others where the router gives one of
  them at least `threshold` of a token in its softmax over all.
- hard: the routers choose among the set's experts only. What is not in the set is never read.

In soft and hard mode the softmax runs over those that may be chosen. Threshold 0 is the full
model; above 1, soft is hard.
"""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .models.args import ModelArgs
from .models.fingerprint import checkpoint_fingerprint
from .models.hash_routing import check_whole
from .runtime.amounts import format_bytes
from .runtime.budget import MemoryPlan, PlanLine, with_headroom
from .runtime.errors import RecordError, UsageError
from .runtime.index import StoreIndex
from .runtime.sets import SET_MODES, ExpertSet, SetOwner, check_threshold, resolve

if TYPE_CHECKING:
    from .models.causal_lm import CausalLM
    from .runtime.cache_base import CacheBase

_THRESHOLD_BY_TOP_K = 0.8  # divided by top-k; docs/sets.md has what others cost
_NOBODY = 2.0  # a threshold that no share reaches
_HALF_LIFE = 16.0  # tokens, of the policy's memory


@dataclass(frozen=True, slots=True)
class ActiveSet:
    """A set and how it is used. `threshold` stands for soft only."""

    expert_set: ExpertSet
    mode: str
    threshold: float

    @property
    def changes_output(self) -> bool:
        return self.mode != "exact"

    @property
    def label(self) -> str:
        """`set code, hard`: what answers are labelled with."""
        limit = f" {self.threshold:.3g}" if self.mode == "soft" else ""
        return f"set {self.expert_set.name}, {self.mode}{limit}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        num_experts = sum(self.expert_set.num_experts.values())
        return {
            "name": self.expert_set.name,
            "mode": self.mode,
            "threshold": self.threshold if self.mode == "soft" else None,
            "method": self.expert_set.method,
            "num_kept": self.expert_set.num_kept,
            "num_experts": num_experts,
            "changes_output": self.changes_output,
        }


def owner_of(index: StoreIndex, args: ModelArgs) -> SetOwner:
    """What a set must go together with to be used with this store."""
    return SetOwner(
        checkpoint_fingerprint(index),
        index.sha256.get("tokenizer.json"),
        index.layer_to_num_experts,
        args.top_k,
    )


def find_set(
    index: StoreIndex, args: ModelArgs, name: str, mode: str, threshold: float | None
) -> ActiveSet:
    """The set `NAME`, `A+B` or `A&B` of a store. Raises UsageError, NotFoundError, FormatError."""
    if mode not in SET_MODES:
        raise UsageError(f"unknown set mode `{mode}`", f"expected one of {', '.join(SET_MODES)}")
    if threshold is None:
        threshold = _THRESHOLD_BY_TOP_K / args.top_k
    else:
        threshold = check_threshold(threshold, mode)
    expert_set = resolve(index.path, name, owner_of(index, args))
    if mode != "exact":
        check_tables(args, expert_set)
    return ActiveSet(expert_set, mode, threshold)


def check_tables(args: ModelArgs, expert_set: ExpertSet) -> None:
    """UsageError for a set that leaves experts of a hash-routed layer out."""
    masks = expert_set.masks()
    for layer in args.hash_layers:
        check_whole(layer, masks[layer] != 0)


def mask_routers(model: "CausalLM", active: ActiveSet | None) -> None:
    """Route the next token by this set; None: by the full model."""
    masks = active.expert_set.masks() if active and active.changes_output else None
    soft = active is not None and active.mode == "soft"
    model.set_masks(masks, active.threshold if soft else _NOBODY)


def warm_up(cache: "CacheBase", active: ActiveSet, top_k: int) -> None:
    """Read the set's experts as far as there is room, those with most picks first, and let the
    eviction policy start as if they had been in use."""
    expert_set = active.expert_set
    key_of = {name: key for key, name in enumerate(cache.table.names)}
    keys = [key_of[pair] for pair in expert_set.by_use()]
    share = {layer: expert_set.shares_of(layer) for layer in expert_set.kept}
    # What the frequency of a record in steady use would have decayed to.
    uses = top_k * _HALF_LIFE / np.log(2.0)
    counts = [uses * share[layer][expert] for layer, expert in expert_set.by_use()]
    cache.seed(keys, np.array(counts))
    with suppress(RecordError):  # whoever wants the record is told
        cache.preload(keys)


def plan_with_set(plan: MemoryPlan, index: StoreIndex, active: ActiveSet | None) -> MemoryPlan:
    """The plan, its experts being those of a hard set: others are never in memory."""
    if active is None or active.mode != "hard":
        return plan
    pairs = active.expert_set.pairs
    num_bytes = sum(index.records[pair].num_bytes for pair in pairs)
    num_cached = min(len(pairs), len(pairs) * plan.cache_bytes // num_bytes)
    share = f"{100 * num_cached / len(pairs):.0f} %"
    text = f"{num_cached} of {len(pairs)} experts of the set {active.expert_set.name}, {share}"
    last = plan.lines[-1]
    varying = ("headroom", "unused", last.name)
    fixed = sum(line.num_bytes for line in plan.lines if line.name not in varying)
    saved = index.expert_bytes - num_bytes
    return replace(
        plan,
        lines=(*plan.lines[:-1], PlanLine(last.name, last.num_bytes, text)),
        max_cache_bytes=num_bytes,
        num_experts=len(pairs),
        resident_budget_bytes=max(plan.floor_bytes, with_headroom(fixed + num_bytes)),
        notes=(*plan.notes, f"the other {format_bytes(saved)} of experts are never read"),
    )
