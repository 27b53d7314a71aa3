"""The decoder: embedding -> layers -> norm -> lm_head. One class for every architecture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kv_cache import KVCache
from ..runtime import kernels
from ..runtime.budget import CHUNK
from ..runtime.errors import UsageError
from . import load_module
from .args import ModelArgs
from .layers import Attention, DenseMlp, RMSNorm
from .moe import Experts, MoEBlock, OnRoute
from .rope import Rotary
from .trunk import ReadTensor, Trunk


class DecoderLayer:
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(
        self,
        args: ModelArgs,
        trunk: Trunk,
        layer: int,
        experts: Experts,
        pool: kernels.ThreadPool | None,
        backend: str | None,
    ) -> None:
        self._input_norm = RMSNorm(trunk.vector("layer.input_norm", layer), args.rms_eps, backend)
        self._attention = Attention(args, trunk, layer, pool, backend)
        self._post_norm = RMSNorm(trunk.vector("layer.post_norm", layer), args.rms_eps, backend)
        self._moe = self._dense = None
        if layer in args.moe_layers:
            self._moe = MoEBlock(args, trunk, layer, experts, pool)
        else:
            self._dense = DenseMlp(trunk, layer, "", pool)

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


class CausalLM:
    """A model whose trunk is resident and whose experts are asked of an executor.

    `trunk` gives a stored tensor by its checkpoint name (`trunk.ReadTensor`); it is called once per
    tensor. The largest come first: while a tensor is packed it is in memory twice, and that must
    not be on top of all the others.
    """

    def __init__(
        self,
        args: ModelArgs,
        trunk: ReadTensor,
        executor: Experts,
        pool: kernels.ThreadPool | None,
        backend: str | None = None,
    ) -> None:
        self.args = args
        self._pool = pool
        weights = Trunk(args, load_module(args.model_type).TRUNK, trunk, backend)
        self._embed = weights.embedding("embed")
        self._lm_head = self._embed if args.tie_embeddings else weights.matrix("lm_head")
        self._rotary = Rotary(args.rope)
        self._layers = [
            DecoderLayer(args, weights, layer, executor, pool, backend)
            for layer in range(args.num_layers)
        ]
        self._norm = RMSNorm(weights.vector("norm"), args.rms_eps, backend)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Sequence[int] | Tensor,
        kv_cache: KVCache,
        logits: str = "last",
        on_route: OnRoute | None = None,
    ) -> Tensor:
        """Append T tokens to the cache; returns fp32 logits `[n, vocab]`.

        `logits`: "last" (n = 1), "all" (n = T) or "none" (n = 0). The bits of a row depend on
        neither T nor how a text is split into calls (native backend). Raises UsageError before
        anything is computed where the ids are not of the vocabulary or the context is too short.
        A call that fails leaves the cache as it was.
        """
        if logits not in ("last", "all", "none"):
            raise UsageError(f"`logits` must be last, all or none, got `{logits}`")
        ids = torch.as_tensor(token_ids, dtype=torch.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UsageError("a step needs at least one token", f"got shape {list(ids.shape)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.args.vocab:
            wrong = low if low < 0 else high
            raise UsageError(
                f"token id {wrong} is not in the vocabulary", f"expected 0 to {self.args.vocab - 1}"
            )
        kv_cache.check_room(len(ids))
        start, rows = kv_cache.offset, []
        try:
            for begin in range(0, len(ids), CHUNK):
                x = self._run_layers(ids[begin : begin + CHUNK], kv_cache, on_route)
                if logits == "all":
                    rows.append(self._logits(x))
        except BaseException:
            kv_cache.trim(start)
            raise
        if logits == "last":
            return self._logits(x[-1:])
        return torch.cat(rows) if rows else torch.empty((0, self.args.vocab))

    def _run_layers(self, ids: Tensor, kv_cache: KVCache, on_route: OnRoute | None) -> Tensor:
        x = self._embed.rows_of(ids)
        angles = self._rotary.angles(kv_cache.offset, len(ids), kv_cache.capacity)
        for layer in self._layers:
            x = layer(x, kv_cache, angles, on_route)
        kv_cache.advance(len(ids))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self._lm_head.linear(self._norm(x), None, self._pool)
