"""The decoder: embedding -> layers -> norm -> lm_head. One class for every architecture."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..kv_cache import KVCache
from ..runtime import core, kernels
from ..runtime.budget import CHUNK
from ..runtime.errors import UsageError
from ..runtime.prefetch import Prefetcher
from . import load_module
from .args import ModelArgs
from .hash_routing import check_whole
from .moe import Experts, OnRoute
from .native import NativeLayers
from .reference_layers import ReferenceLayers
from .rules import RoutingCounts, Rule
from .steps import ForcedRoutes, Steps, check_token_ids
from .trunk import ReadTensor, Trunk


class CausalLM:
    """A model whose trunk is resident and whose experts are asked of an executor.

    `trunk` gives a stored tensor by its checkpoint name (`trunk.ReadTensor`); it is called once per
    tensor. The largest come first: while a tensor is packed it is in memory twice, and that must
    not be on top of all the others.

    `decode` says what runs the layers: `native`, the blocks of the core, or `reference`,
    the same layers out of single operations of NumPy.
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
        backend = backend or core.BACKEND
        weights = Trunk(args, load_module(args.model_type).TRUNK, trunk, backend)
        embed = weights.embedding("embed")
        lm_head = embed if args.tie_embeddings else weights.matrix("lm_head")
        layers = [weights.layer(layer) for layer in range(args.num_layers)]
        self.is_native = backend == "native"
        self.decode = "native" if self.is_native else "reference"
        kind = NativeLayers if self.is_native else ReferenceLayers
        self.bodies: dict[int, np.ndarray] = {}  # by layer, of `set_bodies`
        self._layers = kind(args, layers, embed, weights.vector("norm"), lm_head, executor, pool)

    def set_masks(self, masks: Mapping[int, np.ndarray] | None, threshold: float = 2.0) -> None:
        """From the next token on, keep the routers to some experts: by MoE layer u8 [E], 0 is out.
        None: all are in again. `threshold` as in `Router.set_mask`."""
        for layer in self.args.hash_layers if masks is not None else ():
            check_whole(layer, np.asarray(masks[layer]) != 0)
        for layer in self.args.moe_layers:
            mask = None if masks is None else np.ascontiguousarray(masks[layer], dtype=np.uint8)
            if mask is not None and layer in self.bodies:  # a mask is of bodies; null experts stay
                mask = np.append(mask, np.uint8(1))[self.bodies[layer]]
            self._layers.set_mask(layer, mask, threshold)

    def set_bodies(self, bodies: Mapping[int, np.ndarray]) -> None:
        """Let row e of a router stand for the expert `bodies[layer][e]`, i32 [E], -1: a null expert
        that computes nothing; where a layer is not named, row e is expert e. Expert ids are those
        of bodies then. Masks are to be set afterwards."""
        self.bodies = {k: np.ascontiguousarray(v, dtype=np.int32) for k, v in bodies.items()}
        for layer in self.args.moe_layers:
            self._layers.set_bodies(layer, self.bodies.get(layer))

    def set_gains(self, gains: Mapping[int, np.ndarray]) -> None:
        """From the next token on, multiply routing weights: by MoE layer fp32 [E] of router rows; 0
        takes an expert out of the choice. Layers that are not named: 1 each."""
        for layer in gains.keys() & set(self.args.hash_layers):
            check_whole(layer, np.asarray(gains[layer]) != 0)
        for layer in self.args.moe_layers:
            row = gains.get(layer)
            row = None if row is None else np.ascontiguousarray(row, dtype=np.float32)
            self._layers.set_gains(layer, row)

    def set_rule(self, rule: Rule) -> None:
        """From the next token on, how many of the experts that routers choose a token goes
        through."""
        self._layers.set_rule(rule)

    def set_thetas(self, thetas: Mapping[int, np.ndarray]) -> None:
        """By what experts stand in for themselves as auxiliary ones: by MoE layer fp32 [E, D]."""
        for layer in self.args.moe_layers:
            self._layers.set_theta(layer, thetas.get(layer))

    def routing_counts(self) -> RoutingCounts:
        """How many experts tokens went through since the start."""
        return self._layers.routing_counts()

    @property
    def steps(self) -> Steps:
        """The layers one by one, for whoever takes many texts through one before the next."""
        return self._layers

    def forward(
        self,
        token_ids: Sequence[int] | np.ndarray,
        kv_cache: KVCache,
        logits: str = "last",
        on_route: OnRoute | None = None,
        forced: ForcedRoutes | None = None,
        guesses: np.ndarray | None = None,
    ) -> np.ndarray:
        """Append T tokens to the cache; returns fp32 logits `[n, vocab]`.

        `logits`: "last" (n = 1), "all" (n = T) or "none" (n = 0). The bits of a row depend on
        neither T nor how a text is split into calls (native backend). Raises UsageError before
        anything is computed where the ids are not of the vocabulary or the context is too short.
        A call that fails leaves the cache as it was. `forced`: recorded routes in the place of the
        routers', of one token as [layers with experts, K'], of several as [T, layers, K'].
        `guesses`, of one token of the native backend: see NativeLayers.decode.
        """
        if logits not in ("last", "all", "none"):
            raise UsageError(f"`logits` must be last, all or none, got `{logits}`")
        if self.decodes(token_ids, logits):
            (token_id,) = token_ids
            check_token_ids(token_id, token_id, self.args.vocab)
            kv_cache.check_room(1)
            return self._layers.decode(token_id, kv_cache, on_route, forced, guesses)
        if guesses is not None:
            raise UsageError(
                "guesses can be given for a single token only",
                "the native backend decodes it, and its logits must be asked for",
            )
        if forced is not None:
            forced = self._routes_of(forced, len(token_ids))
        return self._forward(token_ids, kv_cache, logits, on_route, forced)

    def _routes_of(self, forced: ForcedRoutes, num_tokens: int) -> ForcedRoutes:
        """int32 and fp32 [T, layers with experts, K']; UsageError where they do not go with these
        tokens."""
        expected = (num_tokens, len(self.args.moe_layers))
        ids, weights = np.asarray(forced[0], np.int32), np.asarray(forced[1], np.float32)
        if num_tokens == 1 and ids.ndim == 2:
            ids, weights = ids[None], weights[None]
        if ids.ndim != 3 or ids.shape != weights.shape or ids.shape[:2] != expected:
            raise UsageError(
                f"forced routes of shape {ids.shape} do not go with {num_tokens} tokens",
                f"expected [{expected[0]}, {expected[1]}, 1 to {self.args.top_k}]",
            )
        return ids, weights

    def step(self, token_id: int, kv_cache: KVCache) -> tuple[np.ndarray, int | None]:
        """Append one token, as cheaply as that goes. Returns its fp32 logits `[vocab]`, good until
        the next step, and the lowest id of the largest: -1 where that is not finite, None where
        nobody has looked. Raises as `forward`."""
        if not self.is_native:
            return self.forward([token_id], kv_cache)[0], None
        if not 0 <= token_id < self.args.vocab:
            check_token_ids(token_id, token_id, self.args.vocab)
        if kv_cache.offset >= kv_cache.capacity:
            kv_cache.check_room(1)
        return self._layers.step(token_id, kv_cache)

    def guess_with(self, prefetch: Prefetcher) -> None:
        """Read ahead by these guesses from now on, where the core decodes."""
        if self.is_native:
            self._layers.guess_with(prefetch)

    def use_memory(self, address: int | None, num_bytes: int) -> None:
        """Lay the core's scratch there from now on, as far as it fits; None: in its own memory."""
        if self.is_native:
            self._layers.use_memory(address, num_bytes)

    def decodes(self, token_ids: Sequence[int] | np.ndarray, logits: str) -> bool:
        """Whether the core runs this call alone, as one token from the first layer to the last."""
        is_token = isinstance(token_ids, list) and len(token_ids) == 1
        return self.is_native and is_token and logits != "none"

    def _forward(
        self,
        token_ids: Sequence[int] | np.ndarray,
        kv_cache: KVCache,
        logits: str,
        on_route: OnRoute | None,
        forced: ForcedRoutes | None,
    ) -> np.ndarray:
        ids = np.asarray(token_ids, dtype=np.int64)
        if ids.ndim != 1 or len(ids) == 0:
            raise UsageError("a step needs at least one token", f"got shape {list(ids.shape)}")
        check_token_ids(int(ids.min()), int(ids.max()), self.args.vocab)
        kv_cache.check_room(len(ids))
        start, rows = kv_cache.offset, []
        try:
            for begin in range(0, len(ids), CHUNK):
                part = slice(begin, begin + CHUNK)
                routes = forced and (forced[0][part], forced[1][part])
                x = self._layers.run(ids[part], kv_cache, on_route, routes)
                if logits == "all":
                    rows.append(self._layers.logits(x))
        except BaseException:
            kv_cache.trim(start)
            raise
        if logits == "last":
            return self._layers.logits(x[-1:])
        return np.concatenate(rows or [np.empty((0, self.args.vocab), dtype=np.float32)])
