"""The decoder's layers in torch: the reference backend, and the oracle of the native one."""

from collections.abc import Sequence

from torch import Tensor

from ..kv_cache import KVCache
from ..runtime.kernels import PackedMatrix, ThreadPool
from .args import ModelArgs
from .layers import Attention, DenseMlp, RMSNorm
from .moe import Experts, MoEBlock, OnRoute
from .rope import Rotary
from .trunk import LayerWeights, Linear


class _Layer:
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(
        self, args: ModelArgs, weights: LayerWeights, layer: int, experts: Experts
    ) -> None:
        self._input_norm = RMSNorm(weights.input_norm, args.rms_eps)
        self._attention = Attention(args, weights, layer)
        self._post_norm = RMSNorm(weights.post_norm, args.rms_eps)
        self._moe = self._dense = None
        if weights.router is not None:
            self._moe = MoEBlock(args, weights, layer, experts)
        else:
            self._dense = DenseMlp(weights)

    def __call__(
        self,
        x: Tensor,
        kv_cache: KVCache,
        angles: tuple[Tensor, Tensor],
        on_route: OnRoute | None,
    ) -> Tensor:
        x = x + self._attention(self._input_norm(x), kv_cache, angles)
        normed = self._post_norm(x)
        return x + (self._moe(normed, on_route) if self._moe else self._dense(normed))


class TorchLayers:
    """All layers of a model, with the face of `NativeLayers`; torch has its own threads."""

    def __init__(
        self,
        args: ModelArgs,
        layers: Sequence[LayerWeights],
        embed: PackedMatrix,
        norm: Tensor,
        lm_head: Linear,
        experts: Experts,
        pool: ThreadPool | None,
    ) -> None:
        self._embed, self._lm_head = embed, lm_head
        self._norm = RMSNorm(norm, args.rms_eps)
        self._rotary = Rotary(args.rope)
        self._layers = [
            _Layer(args, weights, number, experts) for number, weights in enumerate(layers)
        ]

    def run(self, ids: Tensor, kv_cache: KVCache, on_route: OnRoute | None) -> Tensor:
        """Append the tokens ids `[T]` to the context; returns x `[T, D]` behind the last layer."""
        x = self._embed.rows_of(ids)
        angles = self._rotary.angles(kv_cache.offset, len(ids), kv_cache.capacity)
        for layer in self._layers:
            x = layer(x, kv_cache, angles, on_route)
        kv_cache.advance(len(ids))
        return x

    def logits(self, x: Tensor) -> Tensor:
        """x `[T, D]` -> fp32 logits `[T, vocab]`."""
        return self._lm_head.linear(self._norm(x))
