"""What the core's routers choose: masks, bodies, gains, rules. Floor 2."""

from abc import ABC, abstractmethod
from dataclasses import astuple

import numpy as np

from ..runtime import core
from ..runtime.errors import EdgeMoeError
from .rules import RoutingCounts, Rule
from .steps import Routed


class NativeRouting(ABC):
    """The part of `NativeLayers` that is about routes."""

    def __init__(self) -> None:
        self._has_auxiliary = False
        self._computes_all = True  # every expert that a router or a table chooses
        self._thetas: dict[int, np.ndarray | None] = {}
        self._bodies: dict[int, np.ndarray | None] = {}

    @abstractmethod
    def _decoder(self) -> int:
        """Handle of the core's decoder."""

    def set_mask(self, layer: int, mask: np.ndarray | None, threshold: float) -> None:
        """Leave the experts that `mask` u8 [E] has 0 for out; see `em_decoder_set_mask`."""
        kept = None if mask is None else mask.ctypes.data
        check_step(core.lib.em_decoder_set_mask(self._decoder(), layer, kept, threshold))

    def set_bodies(self, layer: int, bodies: np.ndarray | None) -> None:
        """Let row e of a layer's router stand for body `bodies[e]`, i32 [E]; see
        `em_decoder_set_bodies`."""
        self._bodies[layer] = bodies
        address = None if bodies is None else bodies.ctypes.data
        check_step(core.lib.em_decoder_set_bodies(self._decoder(), layer, address))

    def set_gains(self, layer: int, gains: np.ndarray | None) -> None:
        """Multiply a layer's routing weights by fp32 [E]; see `em_decoder_set_gains`."""
        address = None if gains is None else gains.ctypes.data
        check_step(core.lib.em_decoder_set_gains(self._decoder(), layer, address))

    def set_rule(self, rule: Rule) -> None:
        """How many of the experts that routers choose a token goes through."""
        table = core.RoutingRule(*astuple(rule))
        check_step(core.lib.em_decoder_set_routing(self._decoder(), table))
        self._has_auxiliary = rule.num_auxiliary > 0
        self._computes_all = rule.is_plain and not rule.cold_share and not rule.stand_ins

    def set_theta(self, layer: int, theta: np.ndarray | None) -> None:
        """By what a layer's experts stand in for themselves as auxiliary ones, fp32 [E, D]."""
        self._thetas[layer] = theta  # the core points into it
        address = None if theta is None else theta.ctypes.data
        check_step(core.lib.em_decoder_set_theta(self._decoder(), layer, address))

    def routing_counts(self) -> RoutingCounts:
        """Sums since the start, while anything but plain top-k was set."""
        stats = core.RoutingStats()
        core.lib.em_decoder_get_routing_stats(self._decoder(), stats)
        return RoutingCounts(*(getattr(stats, name) for name, _ in stats._fields_))

    def expert_inputs(self, layer: int, routed: Routed) -> np.ndarray:
        """What the experts of a layer take, `[T, D]`, of the tokens that it attended to last."""
        if not self._has_auxiliary:
            return routed.normed
        x = np.empty_like(routed.normed)
        parts = (len(x), routed.normed.ctypes.data, x.ctypes.data)
        check_step(core.lib.em_decoder_expert_inputs(self._decoder(), *parts))
        return x


def check_step(status: int) -> None:
    """Raises EdgeMoeError for what the core refused."""
    if status:
        raise EdgeMoeError("the core refused a step of the decoder", f"status {status}")
