"""Router and MoE block. T tokens, E experts, K top-k, D hidden.

The block knows nothing of where experts are: it hands expert ids and routing weights to the
executor, which reads, keeps and computes them.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..runtime import kernels
from .args import ModelArgs
from .layers import DenseMlp, sigmoid
from .trunk import Trunk

# Called with (layer, expert_ids [T, K], routing_weights [T, K]) whenever a router has spoken.
OnRoute = Callable[[int, Tensor, Tensor], None]


class Experts(Protocol):
    """The part of the executor that the wiring uses."""

    def run(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor: ...


class Router:
    """softmax -> top-k -> optional renormalisation, in fp32."""

    def __init__(
        self, args: ModelArgs, trunk: Trunk, layer: int, pool: kernels.ThreadPool | None
    ) -> None:
        self._weight = trunk.matrix("layer.router", layer)
        self._top_k, self._renormalise, self._pool = args.top_k, args.norm_topk, pool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[T, D]` -> expert_ids int64 `[T, K]`, routing_weights fp32 `[T, K]`."""
        scores = torch.softmax(self._weight.linear(x, None, self._pool), dim=-1)
        weights, expert_ids = torch.topk(scores, self._top_k, dim=-1)
        if self._renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return expert_ids, weights


class MoEBlock:
    """Routed experts, plus the shared expert behind its sigmoid where there is one."""

    def __init__(
        self,
        args: ModelArgs,
        trunk: Trunk,
        layer: int,
        experts: Experts,
        pool: kernels.ThreadPool | None,
    ) -> None:
        self._layer, self._experts, self._pool = layer, experts, pool
        self._router = Router(args, trunk, layer, pool)
        self._shared = self._shared_weight = None
        if args.shared_width:
            self._shared = DenseMlp(trunk, layer, "shared_", pool)
            self._shared_weight = trunk.matrix("layer.shared_weight", layer)

    def __call__(self, x: Tensor, on_route: OnRoute | None = None) -> Tensor:
        expert_ids, weights = self._router(x)
        if on_route is not None:
            on_route(self._layer, expert_ids, weights)
        y = self._experts.run(self._layer, x, expert_ids, weights)
        if self._shared is None:
            return y
        share = sigmoid(self._shared_weight.linear(x, None, self._pool))  # [T, 1]
        return y + share * self._shared(x)
