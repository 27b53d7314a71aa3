"""The decoder's layers in NumPy: the reference backend, and the oracle of the native one."""

from collections.abc import Sequence

import numpy as np

from ..kv_cache import KVCache
from ..runtime.kernels import PackedMatrix, ThreadPool
from . import steps
from .args import ModelArgs
from .layers import Attention, DenseMlp, RMSNorm
from .moe import Experts, MoEBlock, OnRoute
from .rope import Rotary
from .rules import RoutingCounts, Rule
from .steps import ForcedRoutes, Routed
from .trunk import LayerWeights, Linear


class _Layer:
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, args: ModelArgs, weights: LayerWeights, layer: int) -> None:
        self.input_norm = RMSNorm(weights.input_norm, args.rms_eps)
        self.attention = Attention(args, weights, layer)
        self.post_norm = RMSNorm(weights.post_norm, args.rms_eps)
        self.moe = self.dense = None
        if weights.router is not None:
            self.moe = MoEBlock(args, weights)
        else:
            self.dense = DenseMlp(weights)


class ReferenceLayers:
    """All layers of a model, with the face of `NativeLayers`; NumPy has its own threads."""

    def __init__(
        self,
        args: ModelArgs,
        layers: Sequence[LayerWeights],
        embed: PackedMatrix,
        norm: np.ndarray,
        lm_head: Linear,
        experts: Experts,
        pool: ThreadPool | None,
    ) -> None:
        self.args, self.experts = args, experts
        self.weights = layers
        self._embed, self._lm_head = embed, lm_head
        self._norm = RMSNorm(norm, args.rms_eps)
        self._rotary = Rotary(args.rope)
        self._layers = [_Layer(args, weights, number) for number, weights in enumerate(layers)]

    def set_mask(self, layer: int, mask: np.ndarray | None, threshold: float) -> None:
        """Leave the experts that `mask` u8 [E] has 0 for out of the choice of a layer's router."""
        self._layers[layer].moe.router.set_mask(mask, threshold)

    def set_bodies(self, layer: int, bodies: np.ndarray | None) -> None:
        """Let row e of a layer's router stand for body `bodies[e]`, i32 [E]."""
        self._layers[layer].moe.router.set_bodies(bodies)

    def set_gains(self, layer: int, gains: np.ndarray | None) -> None:
        """Multiply a layer's routing weights by fp32 [E]; 0 takes an expert out of the choice."""
        self._layers[layer].moe.router.set_gains(gains)

    def set_theta(self, layer: int, theta: np.ndarray | None) -> None:
        """By what a layer's experts stand in for themselves as auxiliary ones, fp32 [E, D]."""
        self._layers[layer].moe.router.set_theta(theta)

    def routing_counts(self) -> RoutingCounts:
        """Sums of all layers since the start."""
        routers = [part.moe.router for part in self._layers if part.moe is not None]
        counts = ([r.num_routed for r in routers], [r.num_active for r in routers])
        return RoutingCounts(*map(sum, counts))

    def expert_inputs(self, layer: int, routed: Routed) -> np.ndarray:
        """What the experts of a layer take, `[T, D]`, of the tokens that it attended to last."""
        return self._layers[layer].moe.router.expert_inputs(routed.normed)

    def set_rule(self, rule: Rule) -> None:
        """How many of the experts that routers choose a token goes through."""
        for part in self._layers:
            if part.moe is not None:
                part.moe.router.rule = rule

    def run(
        self,
        ids: np.ndarray,
        kv_cache: KVCache,
        on_route: OnRoute | None,
        forced: ForcedRoutes | None = None,
    ) -> np.ndarray:
        """Append the tokens ids `[T]` to the context; returns x `[T, D]` behind the last layer."""
        return steps.run(self, ids, kv_cache, on_route, forced)

    def embed(self, ids: np.ndarray) -> np.ndarray:
        steps.check_token_ids(int(ids.min()), int(ids.max()), self.args.vocab)
        return self._embed.rows_of(ids)

    def attend(
        self, layer: int, x: np.ndarray, kv_cache: KVCache, routed: Routed, ids: np.ndarray
    ) -> None:
        part = self._layers[layer]
        angles = self._rotary.angles(kv_cache.offset, len(x), kv_cache.capacity)
        x += part.attention(part.input_norm(x), kv_cache, angles)
        routed.normed[:] = part.post_norm(x)
        if part.moe is not None:
            routes = part.moe.router(routed.normed, ids)
            routed.expert_ids[:], routed.routing_weights[:] = routes

    def finish(self, layer: int, x: np.ndarray, routed: Routed, y: np.ndarray | None) -> None:
        part = self._layers[layer]
        x += part.dense(routed.normed) if y is None else part.moe.finish(routed.normed, y)

    def logits(self, x: np.ndarray) -> np.ndarray:
        """x `[T, D]` -> fp32 logits `[T, vocab]`."""
        return self._lm_head.linear(self._norm(x))
