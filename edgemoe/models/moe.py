"""Router and MoE block in torch, and what both backends ask of an executor. T tokens, E experts,
K top-k, D hidden.

Nothing here knows where experts are: expert ids and routing weights go to the executor, which
reads, keeps and computes them.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..runtime.native_cache import NativeCache
from ..runtime.records import RecordTable
from .args import ModelArgs
from .layers import DenseMlp, sigmoid
from .trunk import LayerWeights, Linear

# Called with (layer, expert_ids int64 [T, K], routing_weights fp32 [T, K]) for every router that
# has spoken, layers ascending; the ids of a token ascend.
OnRoute = Callable[[int, Tensor, Tensor], None]


class Experts(Protocol):
    """The part of the executor that the wiring uses; `run` is all that the torch path asks for."""

    table: RecordTable
    cache: NativeCache  # that the core decodes tokens through

    def run(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor: ...


class Router:
    """softmax -> top-k -> optional renormalisation, in fp32."""

    def __init__(self, args: ModelArgs, weight: Linear) -> None:
        self._weight, self._top_k, self._renormalise = weight, args.top_k, args.norm_topk
        self._mask: Tensor | None = None
        self._threshold = 0.0

    def set_mask(self, mask: np.ndarray | None, threshold: float) -> None:
        """Leave the experts that `mask` u8 [E] has 0 for out; at least K have 1. None: all are in.

        An expert that is out comes back for a token of which it has a share of at least `threshold`
        in the softmax over all experts; above 1 there is no such token.
        """
        self._mask = None if mask is None else torch.from_numpy(mask != 0)
        self._threshold = threshold

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `[T, D]` -> expert_ids int64 `[T, K]`, ascending, routing_weights fp32 `[T, K]`."""
        logits = self._weight.linear(x)
        if self._mask is None:
            return self._choose(logits)
        if self._threshold > 1:
            return self._among(logits, self._mask)
        is_in = self._mask | (torch.softmax(logits, dim=-1) >= self._threshold)
        rows = [self._among(logits[t : t + 1], row) for t, row in enumerate(is_in)]
        return torch.cat([ids for ids, _ in rows]), torch.cat([weights for _, weights in rows])

    def _among(self, logits: Tensor, is_in: Tensor) -> tuple[Tensor, Tensor]:
        """The choice among some experts, bool `[E]`: that of a router with their rows only."""
        kept = is_in.nonzero()[:, 0]
        places, weights = self._choose(logits[:, kept])
        return kept[places], weights

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(logits, dim=-1)
        weights, expert_ids = torch.topk(scores, self._top_k, dim=-1)
        if self._renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        expert_ids, order = expert_ids.sort(dim=-1)
        return expert_ids, weights.gather(-1, order)


class MoEBlock:
    """The router of a layer, and the shared expert behind its sigmoid where there is one."""

    def __init__(self, args: ModelArgs, weights: LayerWeights) -> None:
        self.router = Router(args, weights.router)
        self._shared, self._shared_weight = None, weights.shared_weight
        if self._shared_weight is not None:
            self._shared = DenseMlp(weights)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output: y of the routed experts, and the shared expert of x `[T, D]`."""
        if self._shared is None:
            return y
        share = sigmoid(self._shared_weight.linear(x))  # [T, 1]
        return y + share * self._shared(x)
