"""How many experts a token goes through, and how many it went through. Floor 2; no torch."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True, slots=True)
class Rule:
    """How many of the K experts that a router chooses a token goes through; see em_routing.

    `active_experts` 0: K (SEER-MoE's override, 2404.05089). `top_p` 0 or 1: all of those; below, no
    more than it takes for shares of the softmax that add up to more than `top_p`, one at least,
    whose weights stay as they are without it (2403.07652). `num_auxiliary`: the next largest so
    many stand in the input of the active with their theta alone (compressed experts, 2503.00634).
    `cold_share`, `max_dropped`, `stand_ins`, `stand_in_after`: of the core, for one token; the
    reference has runtime/cold.py and runtime/stand_ins.py.
    """

    active_experts: int = 0
    num_auxiliary: int = 0
    top_p: float = 0.0
    cold_share: float = 0.0
    max_dropped: float = 0.0
    stand_ins: bool = False
    stand_in_after: float = 0.0

    @property
    def is_plain(self) -> bool:
        return self.active_experts == 0 and not 0 < self.top_p < 1


@dataclass(frozen=True, slots=True)
class RoutingCounts:
    """Tokens times layers that were routed, the experts that they went through, records that were
    left out as cold, and experts of which a stand-in was computed."""

    num_routed: int = 0
    num_active: int = 0
    num_dropped: int = 0
    num_stand_ins: int = 0

    @property
    def mean_active(self) -> float | None:
        """Experts of a token and layer; None: none was counted."""
        return self.num_active / self.num_routed if self.num_routed else None

    def __sub__(self, other: "RoutingCounts") -> "RoutingCounts":
        return RoutingCounts(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))
