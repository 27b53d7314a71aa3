"""Norm, attention and the dense gated MLP. T tokens, D hidden, H heads, KV key/value heads.

A row of every result depends on that row alone: reductions go through the kernels, and NumPy
computes the exponentials, since torch's own take another code path at the end of a vector than in
the middle, so that the bits of a row would depend on T and on the number of threads.
"""

import numpy as np
import torch
from torch import Tensor

from ..kv_cache import KVCache
from ..runtime import kernels
from .args import ModelArgs
from .rope import rotate
from .trunk import Trunk


def sigmoid(x: Tensor) -> Tensor:
    values = x.numpy()
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, as it should
        return torch.from_numpy(1.0 / (1.0 + np.exp(-values)))


def silu(x: Tensor) -> Tensor:
    values = x.numpy()
    with np.errstate(over="ignore"):
        return torch.from_numpy(values / (1.0 + np.exp(-values)))


class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, weight: Tensor, eps: float, backend: str | None) -> None:
        self._weight, self._eps, self._backend = weight, eps, backend

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self._weight, self._eps, self._backend)


class Attention:
    """Grouped-query attention with rotary positions, optional biases, QK-norm, clip and window."""

    def __init__(
        self,
        args: ModelArgs,
        trunk: Trunk,
        layer: int,
        pool: kernels.ThreadPool | None,
        backend: str | None,
    ) -> None:
        self._layer, self._pool, self._backend = layer, pool, backend
        self._head_dim, self._num_kv_heads = args.head_dim, args.num_kv_heads
        self._clip, self._window = args.clip_qkv, args.window[layer]
        self._projections = {slot: trunk.matrix(f"layer.{slot}", layer) for slot in "qkvo"}
        self._biases = {slot: trunk.optional_vector(f"layer.{slot}_bias", layer) for slot in "qkvo"}
        self._norms: dict[str, RMSNorm] = {}
        if args.qk_norm != "none":
            for slot in "qk":
                weight = trunk.vector(f"layer.{slot}_norm", layer)
                self._norms[slot] = RMSNorm(weight, args.rms_eps, backend)
        self._norm_per_head = args.qk_norm == "head"

    def __call__(self, x: Tensor, kv_cache: KVCache, angles: tuple[Tensor, Tensor]) -> Tensor:
        """x, result `[T, D]`; angles: cosine and sine of the T positions from `offset` on."""
        queries = rotate(self._heads(x, "q"), *angles).contiguous()
        keys, values = kv_cache.append(
            self._layer, rotate(self._heads(x, "k"), *angles), self._heads(x, "v")
        )
        mixed = kernels.attention(
            queries,
            keys,
            values,
            kv_cache.offset,
            self._window,
            self._head_dim**-0.5,
            self._pool,
            self._backend,
        )
        return self._linear(mixed, "o")

    def _heads(self, x: Tensor, slot: str) -> Tensor:
        """A projection split into heads, `[T, H or KV, hd]`, normed and clipped."""
        y = self._linear(x, slot)
        norm = self._norms.get(slot)
        if norm is not None and not self._norm_per_head:
            y = norm(y)
        if self._clip is not None:
            y = y.clamp(-self._clip, self._clip)
        y = y.reshape(len(y), -1, self._head_dim)
        return norm(y) if norm is not None and self._norm_per_head else y

    def _linear(self, x: Tensor, slot: str) -> Tensor:
        return self._projections[slot].linear(x, self._biases[slot], self._pool)


class DenseMlp:
    """down(silu(gate x) * (up x)): the MLP of a layer without experts, and the shared expert."""

    def __init__(
        self, trunk: Trunk, layer: int, prefix: str, pool: kernels.ThreadPool | None
    ) -> None:
        self._gate, self._up, self._down = (
            trunk.matrix(f"layer.{prefix}{slot}", layer) for slot in ("gate", "up", "down")
        )
        self._pool = pool

    def __call__(self, x: Tensor) -> Tensor:
        gated = silu(self._gate.linear(x, None, self._pool))
        return self._down.linear(gated * self._up.linear(x, None, self._pool), None, self._pool)
