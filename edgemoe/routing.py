"""What changes the routes of a token, on request: fewer experts, tuned ones, none that are cold.
Floor 3; no torch. Formulas, sources and what each costs: docs/routing.md.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .active_set import ActiveSet
from .models.args import ModelArgs
from .models.fingerprint import checkpoint_fingerprint
from .models.rules import RoutingCounts, Rule
from .routing_files import read_thetas, read_tuning
from .runtime.errors import UsageError
from .runtime.index import ExpertRecord, StoreIndex
from .runtime.stand_ins import read_stand_ins

if TYPE_CHECKING:
    from .models.causal_lm import CausalLM
    from .runtime.executor import Executor

MAX_DROPPED = 0.25


@dataclass(frozen=True, slots=True)
class Routing:
    """Options that change the output; without any of them nothing changes.

    - `active_experts`: of a token, instead of the model's top-k
    - `top_p`: as many of those as it takes for more than this share of the router's softmax
    - `tune`: a file, or `LAYER:EXPERT=off,LAYER:EXPERT=GAIN`: experts that are never chosen, or
      whose routing weights are multiplied
    - `compressed`: a file of thetas; `active_experts` (here K / 2 by default) are computed, the
      others of the top-k act on their input alone
    - `drop_cold`: while decoding, an expert that is not in memory and has less than this share of a
      token's routing weights is left out, of all experts at most the share `max_dropped`. What the
      output is depends on what was in memory.
    - `stand_in`: while decoding, an expert that is not in memory and comes when more than this
      share of a token's routing weights has gone, most weight first, is computed from its record at
      fewer bits (`edgemoe stand-ins`). What the output is depends on what was in memory.
    """

    active_experts: int | None = None
    top_p: float | None = None
    tune: str | None = None
    compressed: str | None = None
    drop_cold: float | None = None
    max_dropped: float | None = None
    stand_in: float | None = None

    def __post_init__(self) -> None:
        if self.active_experts is not None and (
            not isinstance(self.active_experts, int) or self.active_experts < 1
        ):
            raise UsageError(
                f"{self.active_experts!r} is no number of active experts",
                "every token needs one at least",
            )
        for name in ("top_p", "drop_cold", "max_dropped"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(
                    f"bad option `{name}`", f"expected more than 0 and at most 1, got {value}"
                )
        if self.max_dropped is not None and self.drop_cold is None:
            raise UsageError("`max_dropped` without `drop_cold`", "it bounds what that drops")
        if self.stand_in is not None and not 0 <= self.stand_in <= 1:
            raise UsageError("bad option `stand_in`", f"expected 0 to 1, got {self.stand_in}")

    @property
    def is_plain(self) -> bool:
        """Whether the model's own routes stay as they are."""
        return self == Routing()

    @property
    def depends_on_memory(self) -> bool:
        """Whether the output depends on what was in memory, so that it may differ from run to
        run."""
        return self.drop_cold is not None or self.stand_in is not None

    @property
    def label(self) -> str:
        """`3 active experts, top-p 0.9`: what answers are labelled with."""
        parts = []
        if self.active_experts is not None:
            parts.append(f"{self.active_experts} active experts")
        if self.top_p is not None:
            parts.append(f"router top-p {self.top_p:g}")
        if self.tune is not None:
            parts.append("tuned experts")
        if self.compressed is not None:
            parts.append("compressed experts")
        if self.drop_cold is not None:
            parts.append(f"cold experts below {self.drop_cold:g} dropped")
        if self.stand_in is not None:
            parts.append(f"stand-ins after {self.stand_in:g}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """What is set, as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values = {name: value for name, value in values.items() if value is not None}
        return {"label": self.label, **values, "depends_on_memory": self.depends_on_memory}


@dataclass(frozen=True, slots=True)
class Change:
    """What makes the output another than the full model's: a set, a routing, or both."""

    active_set: ActiveSet | None
    routing: Routing

    @classmethod
    def of(cls, active: ActiveSet | None, routing: Routing) -> "Change | None":
        """None where the output is the full model's."""
        if active is not None and not active.changes_output:
            active = None
        return None if active is None and routing.is_plain else cls(active, routing)

    @property
    def label(self) -> str:
        parts = [self.active_set.label] if self.active_set is not None else []
        return ", ".join(parts + [self.routing.label] * (not self.routing.is_plain))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A routing, read and checked for one model; gains fp32 [E] and thetas fp32 [E, D] by layer."""

    rule: Rule
    gains: dict[int, np.ndarray]
    thetas: dict[int, np.ndarray]


def stand_ins_of(routing: Routing, index: StoreIndex) -> dict[tuple[int, int], ExpertRecord] | None:
    """The stand-ins that a routing needs, None: none. Raises what `read_stand_ins` raises."""
    if routing.stand_in is None:
        return None
    return read_stand_ins(index, checkpoint_fingerprint(index))


def prepare(
    routing: Routing, index: StoreIndex, args: ModelArgs, active: ActiveSet | None
) -> Prepared:
    """Raises UsageError, NotFoundError, FormatError for what does not go with the model."""
    top_k = args.top_k
    num_active = routing.active_experts or 0
    if num_active > top_k:
        raise UsageError(
            f"{num_active} active experts are too many",
            f"this model's routers choose {top_k}",
            f"give 1 to {top_k}",
        )
    gains, thetas, num_auxiliary = {}, {}, 0
    if routing.tune is not None:
        gains = read_tuning(routing.tune, index, args)
    for layer, row in gains.items():
        is_on = row > 0
        if active is not None and active.changes_output:
            kept = active.expert_set.masks()[layer]
            if layer in index.layer_to_bodies:
                kept = np.append(kept, np.uint8(1))[list(index.layer_to_bodies[layer])]
            is_on = is_on & (kept != 0)
        if is_on.sum() < top_k:
            raise UsageError(
                f"too many experts of layer {layer} are off",
                f"{int(is_on.sum())} are left, and every token needs {top_k}",
            )
    if routing.compressed is not None:
        if top_k < 2:
            raise UsageError("a model with top-1 routers has no auxiliary experts")
        num_active = num_active or top_k // 2
        num_auxiliary = top_k - num_active
        thetas = read_thetas(Path(routing.compressed), index, args)
    rule = Rule(
        active_experts=num_active,
        num_auxiliary=num_auxiliary,
        top_p=routing.top_p or 0.0,
        cold_share=routing.drop_cold or 0.0,
        max_dropped=routing.max_dropped or MAX_DROPPED,
        stand_ins=routing.stand_in is not None,
        stand_in_after=routing.stand_in or 0.0,
    )
    return Prepared(rule, gains, thetas)


def apply(prepared: Prepared, model: "CausalLM", executor: "Executor") -> None:
    """Route by it from the next token on."""
    model.set_thetas(prepared.thetas)
    model.set_gains(prepared.gains)
    model.set_rule(prepared.rule)
    rule = prepared.rule
    executor.cold.share, executor.cold.max_dropped = rule.cold_share, rule.max_dropped
    executor.stand_ins.after = rule.stand_in_after if rule.stand_ins else None


def counts_of(model: "CausalLM", executor: "Executor") -> RoutingCounts:
    """What came of it so far: of the core or its twin, and of single tokens in the executor."""
    counts, num_dropped = model.routing_counts(), executor.cold.num_dropped
    return RoutingCounts(
        counts.num_routed,
        counts.num_active - num_dropped,
        counts.num_dropped + num_dropped,
        counts.num_stand_ins + executor.stand_ins.num_used,
    )
