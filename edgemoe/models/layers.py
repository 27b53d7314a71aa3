"""Norm, attention and the dense gated MLP in NumPy: the twins of the core's blocks. T tokens,
D hidden, H heads, KV key/value heads.
"""

import numpy as np

from ..kv_cache import KVCache
from ..runtime import kernels
from ..runtime.reference import silu
from .args import ModelArgs
from .rope import rotate
from .trunk import LayerWeights


def sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, as it should
        return 1.0 / (1.0 + np.exp(-x))


class RMSNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, weight: np.ndarray, eps: float) -> None:
        self._weight, self._eps = weight, eps

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return kernels.rms_norm(x, self._weight, self._eps, "reference")


class Attention:
    """Grouped-query attention with rotary positions, optional biases, QK-norm, clip and window."""

    def __init__(
        self,
        args: ModelArgs,
        weights: LayerWeights,
        layer: int,
    ) -> None:
        self._layer = layer
        self._head_dim, self._num_heads = args.head_dim, args.num_heads
        self._num_kv_heads = args.num_kv_heads
        self._clip, self._window = args.clip_qkv, args.window[layer]
        self._qkv, self._qkv_bias = weights.qkv, weights.qkv_bias
        self._o, self._o_bias = weights.output, weights.output_bias
        self._norms: tuple[RMSNorm, ...] = ()
        if args.qk_norm != "none":
            norms = (weights.q_norm, weights.k_norm)
            self._norms = tuple(RMSNorm(weight, args.rms_eps) for weight in norms)
        self._norm_per_head = args.qk_norm == "head"

    def __call__(
        self, x: np.ndarray, kv_cache: KVCache, angles: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """x, result `[T, D]`; angles: cosine and sine of the T positions from `offset` on."""
        num_tokens = x.shape[0]
        y = self._qkv.linear(x, self._qkv_bias)  # [T, (H + 2 KV) hd]
        if self._norms and not self._norm_per_head:
            y = self._norm_whole(y)
        if self._clip is not None:
            y = y.clip(-self._clip, self._clip)
        heads = y.reshape(num_tokens, -1, self._head_dim)
        to_rotate, values = np.split(heads, [self._num_heads + self._num_kv_heads], axis=1)
        if self._norms and self._norm_per_head:
            to_rotate = self._norm_heads(to_rotate)
        rotated = rotate(to_rotate, *angles)
        keys, values = kv_cache.append(self._layer, rotated[:, self._num_heads :], values)
        mixed = kernels.attention(
            rotated[:, : self._num_heads],
            keys,
            values,
            kv_cache.offset,
            self._window,
            self._head_dim**-0.5,
            None,
            "reference",
            *kv_cache.scales(self._layer),
        )
        return self._o.linear(mixed, self._o_bias)

    def _norm_whole(self, y: np.ndarray) -> np.ndarray:
        """Norm all query heads of a token together, and all key heads."""
        key_width = self._num_kv_heads * self._head_dim
        query_width = self._num_heads * self._head_dim
        query, key, value = np.split(y, [query_width, query_width + key_width], axis=-1)
        norm_query, norm_key = self._norms
        return np.concatenate((norm_query(query), norm_key(key), value), axis=-1)

    def _norm_heads(self, heads: np.ndarray) -> np.ndarray:
        norm_query, norm_key = self._norms
        queries, keys = np.split(heads, [self._num_heads], axis=1)
        return np.concatenate((norm_query(queries), norm_key(keys)), axis=1)


class DenseMlp:
    """down(silu(gate x) * (up x)): the MLP of a layer without experts, and the shared expert."""

    def __init__(self, weights: LayerWeights) -> None:
        self._gate_up, self._down = weights.gate_up, weights.down

    def __call__(self, x: np.ndarray) -> np.ndarray:
        gate, up = np.split(self._gate_up.linear(x), 2, axis=-1)
        return self._down.linear(silu(gate) * up)
