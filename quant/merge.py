"""Which experts become one: the groups of every layer, from what is known of a task.

- uncurl (UNCURL, 2409.01483): spectral clusters of the router's logits, as many of every layer; the
  head of a group is its most picked expert.
- msmoe (M-SMoE, 2310.01334): the most picked experts of all layers together are dominant, so that
  layers differ; every other joins the dominant expert of its layer whose logits are most like its
  own. mc-smoe (MC-SMoE, of the same paper) groups in the same way, and factors the merged bodies
  (factoring.py).
- diversify (2407.09590): spectral clusters of the experts' outputs on the same inputs; the rows of
  the router are merged like the experts.

Bodies, and rows, are averaged by how often the task picked them. E experts of a layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UsageError
from ..runtime.profile import Profile
from .clustering import logit_similarity, spectral_clusters
from .prune import Amount, num_to_keep

Similarities = Mapping[int, NDArray[np.float64]]  # by MoE layer, [E, E]


@dataclass(frozen=True, slots=True)
class Group:
    """Experts that become one; ids ascending. `head` is the one that the others are merged into,
    `weights` (of the members, sum 1) their parts in the average."""

    head: int
    members: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerMerge:
    """The groups of a layer by ascending head: the order of the merged experts."""

    groups: tuple[Group, ...]

    @property
    def num_experts(self) -> int:
        """Before the merge."""
        return sum(len(group.members) for group in self.groups)

    @property
    def heads(self) -> tuple[int, ...]:
        return tuple(group.head for group in self.groups)

    @property
    def bodies(self) -> tuple[int, ...]:
        """The number of the merged expert that stands for each expert `[E]`."""
        found = {e: number for number, group in enumerate(self.groups) for e in group.members}
        return tuple(found[expert] for expert in range(len(found)))


Merge = dict[int, LayerMerge]  # by MoE layer


def router_of(method: str, router: str | None) -> str:
    """What becomes of the routers: the one asked for, else what the method needs no training for.
    Raises UsageError where the two do not go together."""
    usual = "merged" if method == "diversify" else "index-map"
    possible = {"uncurl": ("index-map", "untrained"), "diversify": ("merged",)}
    allowed = possible.get(method, ("index-map",))
    if router is not None and router not in allowed:
        raise UsageError(
            f"`--router {router}` does not go with `--method {method}`",
            f"expected {' or '.join(allowed)}",
        )
    return router or usual


def kept_whole(router: str, hash_layers: Iterable[int]) -> frozenset[int]:
    """The hash-routed layers that no expert may be merged in. Their tables name rows of the router,
    which an index map leaves as they are; others change them. UsageError for `untrained`: a
    checkpoint has as many experts in every layer."""
    layers = frozenset(hash_layers)
    if router == "untrained" and layers:
        raise UsageError(
            "the tables of hash-routed layers cannot be trained",
            f"layers {sorted(layers)} have one",
            "--router index-map",
        )
    return frozenset() if router == "index-map" else layers


def logit_similarities(profile: Profile) -> dict[int, NDArray[np.float64]]:
    """How alike the router's logits of any two experts are. Raises UsageError for a profile
    without them."""
    found = {}
    for layer, sums in profile.layers.items():
        if sums.logit_gram is None:
            raise UsageError("this profile has no products of router logits", "", "calibrate again")
        found[layer] = logit_similarity(sums.logit_gram)
    return found


def choose_groups(
    method: str,
    profile: Profile,
    similarities: Similarities,
    top_k: int,
    amount: Amount,
    seed: int = 0,
) -> Merge:
    """The groups of every layer. At least `top_k` experts of a layer stay apart. Raises UsageError
    for an amount that cannot be."""
    whole = amount.whole_layers(profile.layers)
    counts = {
        layer: sums.num_experts if layer in whole else num_to_keep(amount, sums.num_experts, top_k)
        for layer, sums in profile.layers.items()
    }
    picks = {layer: sums.hard_count for layer, sums in profile.layers.items()}
    if method in ("msmoe", "mc-smoe"):
        return _by_dominant(picks, similarities, counts, top_k)
    merge = {}
    for layer, count in counts.items():
        labels = spectral_clusters(similarities[layer], count, seed)
        groups = (np.flatnonzero(labels == each) for each in range(count))
        merge[layer] = LayerMerge(_ordered(_group(ids, picks[layer]) for ids in groups))
    return merge


def dominant_experts(
    picks: Mapping[int, NDArray[np.integer]], counts: Mapping[int, int], top_k: int
) -> dict[int, list[int]]:
    """M-SMoE's choice, ids ascending, as many together as `counts` of the layers add up to: by
    share of the layer's picks, the first of each layer having 1. `top_k` of each layer come first
    of all, and layers that `counts` leaves whole stay whole."""
    found: dict[int, list[int]] = {}
    left: list[tuple[float, int, int, int]] = []
    for layer, hard in picks.items():
        order = np.argsort(-hard, kind="stable").tolist()
        whole = counts[layer] == len(order)
        found[layer] = order if whole else order[:top_k]
        share = hard / max(int(hard.sum()), 1)
        left += (
            []
            if whole
            else [
                (-float(share[expert]), rank, layer, expert)
                for rank, expert in enumerate(order[top_k:])
            ]
        )
    room = sum(counts.values()) - sum(map(len, found.values()))
    for _, _, layer, expert in sorted(left)[:room]:
        found[layer].append(expert)
    return {layer: sorted(ids) for layer, ids in found.items()}


def _by_dominant(
    picks: Mapping[int, NDArray[np.integer]],
    similarities: Similarities,
    counts: Mapping[int, int],
    top_k: int,
) -> Merge:
    merge = {}
    for layer, heads in dominant_experts(picks, counts, top_k).items():
        alike = similarities[layer][:, heads]
        joins = alike.argmax(axis=1)
        joins[heads] = np.arange(len(heads))
        groups = (
            _group(np.flatnonzero(joins == number), picks[layer], head)
            for number, head in enumerate(heads)
        )
        merge[layer] = LayerMerge(_ordered(groups))
    return merge


def _group(ids: NDArray[np.integer], picks: NDArray[np.integer], head: int | None = None) -> Group:
    """Weights are shares of the picks; where nobody was picked, all the same."""
    counts = picks[ids].astype(np.float64)
    weights = counts / counts.sum() if counts.any() else np.full(len(ids), 1 / len(ids))
    head = int(ids[counts.argmax()]) if head is None else head
    return Group(head, tuple(ids.tolist()), tuple(weights.tolist()))


def _ordered(groups: Iterable[Group]) -> tuple[Group, ...]:
    return tuple(sorted(groups, key=lambda group: group.head))
