"""Router and MoE block in NumPy, and what both backends ask of an executor. T tokens, E experts,
K top-k, D hidden.

Nothing here knows where experts are: expert ids and routing weights go to the executor, which
reads, keeps and computes them.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..runtime.native_cache import NativeCache
from ..runtime.records import RecordTable
from ..runtime.reference import softmax
from .args import ModelArgs
from .layers import DenseMlp, sigmoid
from .routes import choose, input_scale
from .rules import Rule
from .trunk import LayerWeights, Linear

# Called with (layer, expert_ids int64 [T, K], routing_weights fp32 [T, K]) for every router that
# has spoken, layers ascending; the ids of a token ascend, those of one with fewer end with -1.
OnRoute = Callable[[int, np.ndarray, np.ndarray], None]


class Experts(Protocol):
    """The part of the executor that the wiring uses; the reference path asks for `run` alone."""

    table: RecordTable
    cache: NativeCache  # that the core decodes tokens through

    def run(
        self, layer: int, x: np.ndarray, expert_ids: np.ndarray, routing_weights: np.ndarray
    ) -> np.ndarray: ...


class Router:
    """softmax -> top-k -> optional renormalisation, in fp32; what else may stand between them is in
    routes.py."""

    def __init__(
        self, args: ModelArgs, weight: Linear, experts_of_token: np.ndarray | None = None
    ) -> None:
        self._weight, self._top_k, self._renormalise = weight, args.top_k, args.norm_topk
        self._table = experts_of_token  # of a hash-routed layer
        self._mask: np.ndarray | None = None
        self._threshold = 0.0
        self._bodies: np.ndarray | None = None
        self._gains: np.ndarray | None = None
        self._theta: np.ndarray | None = None
        self.rule = Rule()
        self._scales: list[np.ndarray] = []  # of the last call's tokens, [T, D] together; empty: 1
        self.num_routed = self.num_active = 0  # tokens, and their experts

    def set_mask(self, mask: np.ndarray | None, threshold: float) -> None:
        """Leave the experts that `mask` u8 [E] has 0 for out; at least K have 1. None: all are in.

        An expert that is out comes back for a token of which it has a share of at least `threshold`
        in the softmax over all experts; above 1 there is no such token.
        """
        self._mask = None if mask is None else mask != 0
        self._threshold = threshold

    def set_bodies(self, bodies: np.ndarray | None) -> None:
        """Let row e stand for body `bodies[e]`, i32 [E], -1: none; None: for body e."""
        self._bodies = bodies

    def set_gains(self, gains: np.ndarray | None) -> None:
        """Multiply routing weights by fp32 [E]; an expert with 0 is out of the choice."""
        self._gains = gains

    def set_theta(self, theta: np.ndarray | None) -> None:
        """fp32 `[E, D]` by which experts stand in for themselves as auxiliary ones."""
        self._theta = theta

    def __call__(
        self, x: np.ndarray, token_ids: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """x `[T, D]` -> expert_ids int64 `[T, K]`, ascending, routing_weights fp32 `[T, K]`;
        `token_ids` `[T]` for a hash-routed layer."""
        self._scales.clear()
        logits = self._weight.linear(x)
        if self._table is None:
            ids, weights = self._routes(logits)
        else:  # masks and gains of 0 do not go with it
            ids, weights = self._choose(logits, given=self._table[token_ids])
        self.num_routed += len(ids)
        self.num_active += int((ids >= 0).sum())
        return ids, weights

    def expert_inputs(self, x: np.ndarray) -> np.ndarray:
        """What the experts of the tokens that were routed last take of their x `[T, D]`."""
        return x * np.concatenate(self._scales) if self._scales else x

    def _routes(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_in = self._mask
        if self._gains is not None:
            is_on = self._gains > 0
            is_in = is_on if is_in is None else is_in & is_on
        if is_in is None:
            return self._choose(logits)
        if self._mask is None or self._threshold > 1:
            return self._among(logits, is_in)
        insists = softmax(logits) >= self._threshold
        is_in = is_in | (insists if self._gains is None else insists & is_on)
        rows = [self._among(logits[t : t + 1], row) for t, row in enumerate(is_in)]
        return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))

    def _among(self, logits: np.ndarray, is_in: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The choice among some experts, bool `[E]`: that of a router with their rows only."""
        kept = np.flatnonzero(is_in)
        return self._choose(logits[:, kept], kept)

    def _choose(
        self,
        logits: np.ndarray,
        kept: np.ndarray | None = None,
        given: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of logits `[T, n]` of the rows `kept` `[n]`, None: all; of those, `given` `[T, K]`."""
        scores = softmax(logits)
        rows = np.arange(scores.shape[1]) if kept is None else kept
        if self._theta is not None and self.rule.num_auxiliary:
            scale = input_scale(self.rule, scores, rows, self._top_k, self._theta, given)
            self._scales.append(scale)
        is_whole = self._bodies is None and self._gains is None and len(rows) >= self._top_k
        if not self.rule.is_plain or not is_whole or given is not None:
            options = (self._bodies, self._gains, given)
            return choose(self.rule, scores, rows, self._top_k, self._renormalise, *options)
        expert_ids = (-scores).argsort(axis=-1, kind="stable")[:, : self._top_k]
        weights = np.take_along_axis(scores, expert_ids, axis=-1)
        if self._renormalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        order = expert_ids.argsort(axis=-1)
        expert_ids = np.take_along_axis(expert_ids, order, axis=-1)
        return rows[expert_ids], np.take_along_axis(weights, order, axis=-1)


class MoEBlock:
    """The router of a layer, and the shared expert behind its sigmoid where there is one."""

    def __init__(self, args: ModelArgs, weights: LayerWeights) -> None:
        self.router = Router(args, weights.router, weights.experts_of_token)
        self._shared, self._shared_weight = None, weights.shared_weight
        if self._shared_weight is not None:
            self._shared = DenseMlp(weights)

    def finish(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The block's output: y of the routed experts, and the shared expert of x `[T, D]`."""
        if self._shared is None:
            return y
        share = sigmoid(self._shared_weight.linear(x))  # [T, 1]
        return y + share * self._shared(x)
