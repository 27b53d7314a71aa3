"""The records of merged experts: their layouts, and their bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from ..runtime.format import RecordLayout
from ..runtime.index import StoreIndex
from ..runtime.profile import Profile
from .bitplan import BitPlan
from .factoring import Factoring, Moments, factor_body
from .merge import Group, Merge
from .merge_bodies import Orders, merged_body
from .options import ExpertSpec
from .pack import Record, checked, in_order, pack_expert, pack_factored
from .store_source import StoreSource, WeightSource

Layouts = dict[tuple[int, int], RecordLayout]  # by (layer, number of the merged expert)


def merged_layouts(index: StoreIndex, merge: Merge, factoring: Factoring | None = None) -> Layouts:
    """The format of every merged expert: the widest of its members', factored where it shall be."""
    layouts = {}
    for layer, groups in merge.items():
        for number, group in enumerate(groups.groups):
            members = (index.records[layer, expert].layout for expert in group.members)
            widest = max(members, key=lambda layout: layout.num_bytes)
            layouts[layer, number] = factoring.layout(layer, widest) if factoring else widest
    return layouts


@dataclass(frozen=True, slots=True)
class MergedRecords:
    """Makes the records of merged experts. `profile`: what weighs the errors of factors."""

    own: StoreSource
    bodies: WeightSource
    merge: Merge
    layouts: Layouts
    factoring: Factoring | None = None
    profile: Profile | None = None

    def of_layer(self, layer: int, num_threads: int) -> Iterator[tuple[int, Record]]:
        """Number of members, and the record with its checksums, of every group of a layer."""
        groups, specs = self.merge[layer].groups, _specs(self.own.index)

        def make(number: int) -> tuple[int, Record]:
            group = groups[number]
            return len(group.members), self._make(layer, number, group, specs(layer, group.head))

        yield from in_order(make, range(len(groups)), num_threads)

    def _make(self, layer: int, number: int, group: Group, spec: ExpertSpec) -> Record:
        layout = self.layouts[layer, number]
        if len(group.members) == 1:
            stored = self.own.record(layer, group.head, layout)
            if stored is not None:
                return checked(stored, layout)
        orders: Orders = {}
        body = merged_body(group, lambda expert: self.bodies.expert(layer, expert), orders)
        if layout.factors is None:
            return pack_expert(body, layout, spec)
        moments = None if self.profile is None else merged_moments(self.profile, layer, orders)
        factors = layout.factors
        return pack_factored(factor_body(body, factors.dense, factors.rank, moments), layout, spec)


def merged_moments(profile: Profile, layer: int, orders: Orders) -> Moments | None:
    """Of the members together, neurons in the order of the merged body; None where the profile has
    none, or nobody was picked."""
    sums, members = profile.layers[layer], list(orders)
    count = int(sums.hard_count[members].sum())
    if sums.input_square_sum is None or sums.hidden_square_sum is None or not count:
        return None
    inputs = sums.input_square_sum[members].sum(axis=0) / count
    hidden = sum(sums.hidden_square_sum[expert][order] for expert, order in orders.items()) / count
    return Moments(torch.from_numpy(np.asarray(inputs)), torch.from_numpy(np.asarray(hidden)))


def _specs(index: StoreIndex) -> Callable[[int, int], ExpertSpec]:
    """(layer, expert) -> how the store's experts were quantized, as far as that can be repeated
    without a text."""
    plan = index.plan
    if "bit_plan" in plan:
        specs = BitPlan.from_json(plan["bit_plan"]).specs
    else:
        names = [each.name for each in fields(ExpertSpec)]
        one = ExpertSpec(**{name: plan[name] for name in names if name in plan})
        specs = dict.fromkeys(index.records, one)

    def spec(layer: int, expert: int) -> ExpertSpec:
        found = specs.get((layer, expert), ExpertSpec())
        return replace(found, quantizer="search") if found.quantizer == "calibrated" else found

    return spec
