"""The layers as tables of the native core, which runs whole blocks and whole tokens by them.

One numeric path for a prompt and for a token: both go through the same blocks of the core, and a
row has the same bits for every T. A token needs no Python between its first layer and its last.
"""

import ctypes
import threading
from collections.abc import Sequence
from threading import get_ident

import numpy as np

from ..kv_cache import KVCache
from ..runtime import core
from ..runtime.errors import EdgeMoeError
from ..runtime.kernels import PackedMatrix, ThreadPool
from ..runtime.prefetch import Prefetcher
from . import steps
from .args import ModelArgs
from .hash_routing import demand_of
from .moe import Experts, OnRoute
from .native_routing import NativeRouting, check_step
from .native_tables import model_table
from .recorded import check_guesses, check_routes
from .rope import Rotary
from .steps import ForcedRoutes, Routed
from .trunk import LayerWeights, Linear

_ANGLE_BLOCK = 64  # positions whose angles are computed together
# First position, end, capacity of the context; addresses of cosines and sines, and what holds them.
_Angles = tuple[int, int, int, int, int, tuple[np.ndarray, np.ndarray] | None]
_MAIN_THREAD = threading.main_thread().ident


class NativeLayers(NativeRouting):
    """All layers of a model in the core, which gives their scratch back with the last reference.

    The experts are asked for their tables at the first call: an engine makes them after the trunk.
    """

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
        self.args, self.experts, self._pool = args, experts, pool
        self.weights = layers
        self._weights = (layers, embed, norm, lm_head)  # the core's tables point into them
        self._rotary = Rotary(args.rope)
        self._handle: int | None = None
        super().__init__()
        self._stop = ctypes.c_int32()  # written by a signal while a token is decoded
        self._angles: _Angles = (0, 0, 0, 0, 0, None)
        self._angle_bytes = args.rope.rotary_dim // 2 * 4  # of one position
        self._known: dict[int, list[int]] = {}  # by hash-routed layer, keys of the present prompt
        self._step_logits: np.ndarray | None = None
        self._em_decode = core.lib.em_decode
        self._prompt_angles: tuple[tuple[int, int, int], np.ndarray, np.ndarray] | None = None
        num_places = len(args.moe_layers)
        self._routes = np.zeros((num_places, args.top_k), dtype=np.int32)
        self._routing_weights = np.zeros((num_places, args.top_k), dtype=np.float32)
        self._call = core.DecodeArgs(
            routes=self._routes.ctypes.data,
            routing_weights=self._routing_weights.ctypes.data,
            stop=ctypes.addressof(self._stop),
        )
        self._call_address, self._kv = ctypes.byref(self._call), self._call.kv
        self._view, self._is_step, self._thread = None, False, 0  # what it is set for

    def __del__(self) -> None:
        if self._handle:
            core.lib.em_decoder_destroy(self._handle)

    # ---- many tokens ---------------------------------------------------------------------------

    def run(
        self,
        ids: np.ndarray,
        kv_cache: KVCache,
        on_route: OnRoute | None,
        forced: ForcedRoutes | None = None,
    ) -> np.ndarray:
        """Append the tokens ids `[T]` to the context; returns x `[T, D]` behind the last layer."""
        if not self.args.hash_layers:
            return steps.run(self, ids, kv_cache, on_route, forced)
        self._decoder()
        self._known = self._demand(ids, forced) if self._computes_all else {}
        try:
            return steps.run(self, ids, kv_cache, on_route, forced)
        finally:
            self._known = {}
            self._cache.foresee(())  # what a failure has left over

    def _demand(self, ids: np.ndarray, forced: ForcedRoutes | None) -> dict[int, list[int]]:
        """By hash-routed layer, the keys of the records that these tokens will demand."""
        found, first_key = {}, self.experts.table.first_key
        for layer in self.args.hash_layers:
            if forced is None:
                bodies = self._bodies.get(layer)
                experts = demand_of(self.weights[layer].experts_of_token, ids, bodies)
            else:
                experts = np.unique(forced[0][:, self.args.moe_layers.index(layer)])
            found[layer] = (experts[experts >= 0] + first_key[layer]).tolist()
        return found

    def embed(self, ids: np.ndarray) -> np.ndarray:
        steps.check_token_ids(int(ids.min()), int(ids.max()), self.args.vocab)
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        x = np.empty((len(ids), self.args.hidden), dtype=np.float32)
        parts = (ids.ctypes.data, x.ctypes.data)
        check_step(core.lib.em_decoder_embed(self._decoder(), len(ids), *parts))
        return x

    def attend(
        self, layer: int, x: np.ndarray, kv_cache: KVCache, routed: Routed, ids: np.ndarray
    ) -> None:
        token_ids = None
        if layer in self.args.hash_layers:
            token_ids = np.ascontiguousarray(ids, dtype=np.int32)
            known = [key for each, keys in self._known.items() if each >= layer for key in keys]
            if known:  # their reads begin before the layers that come before them run
                self._cache.foresee(known)
        offset, num_tokens = kv_cache.offset, len(x)
        place = (offset, num_tokens, kv_cache.capacity)
        if self._prompt_angles is None or self._prompt_angles[0] != place:
            self._prompt_angles = (place, *self._rotary.angles(*place))
        _, cos, sin = self._prompt_angles
        kv_cache.view.position = offset
        check_step(
            core.lib.em_decoder_attend(
                self._decoder(),
                layer,
                ctypes.byref(kv_cache.view),
                cos.ctypes.data,
                sin.ctypes.data,
                num_tokens,
                None if token_ids is None else token_ids.ctypes.data,
                x.ctypes.data,
                *(part.ctypes.data for part in routed),
            )
        )

    def finish(self, layer: int, x: np.ndarray, routed: Routed, y: np.ndarray | None) -> None:
        check_step(
            core.lib.em_decoder_finish(
                self._decoder(),
                layer,
                len(x),
                routed.normed.ctypes.data,
                None if y is None else y.ctypes.data,
                x.ctypes.data,
            )
        )

    def logits(self, x: np.ndarray) -> np.ndarray:
        """x `[T, D]` -> fp32 logits `[T, vocab]`."""
        x = np.ascontiguousarray(x)
        out = np.empty((len(x), self.args.vocab), dtype=np.float32)
        parts = (x.ctypes.data, out.ctypes.data)
        check_step(core.lib.em_decoder_logits(self._decoder(), len(x), *parts))
        return out

    def guess_with(self, prefetch: Prefetcher) -> None:
        """Decode with these guesses from now on."""
        self._prefetch, self._call.prefetch = prefetch, prefetch.handle

    def use_memory(self, address: int | None, num_bytes: int) -> None:
        """See `em_decoder_use_memory`."""
        self._prompt_angles = None
        check_step(core.lib.em_decoder_use_memory(self._decoder(), address, num_bytes))

    # ---- one token -----------------------------------------------------------------------------

    def step(self, token_id: int, kv_cache: KVCache) -> tuple[np.ndarray, int]:
        """Append one token to the context; returns its fp32 logits `[vocab]`, good until the next
        step, and the lowest id of the largest, -1 where that is not finite."""
        if not self._is_step:
            if self._step_logits is None:
                self._step_logits = np.empty(self.args.vocab, dtype=np.float32)
            self._force(None)
            self._guess(None)
            self._call.logits = self._step_logits.ctypes.data
            self._is_step = True
        self._run_token(token_id, kv_cache, self._routes)
        return self._step_logits, self._call.best_id

    def decode(
        self,
        token_id: int,
        kv_cache: KVCache,
        on_route: OnRoute | None,
        forced: ForcedRoutes | None = None,
        guesses: np.ndarray | None = None,
    ) -> np.ndarray:
        """Append one token to the context; returns its fp32 logits `[1, vocab]`.

        `forced`: routes in the place of those of the routers. Raises UsageError for routes that do
        not go with the model. `guesses`: for a prefetcher to which they are given, expert ids
        [layers with experts, n], the likeliest first, -1: none.
        """
        self._is_step = False
        routes, routing_weights = self._routes, self._routing_weights
        if forced is not None or self._call.forced_ids:
            routes, routing_weights = self._force(forced)
        logits = np.empty((1, self.args.vocab), dtype=np.float32)
        if guesses is not None or self._call.guesses:
            self._guess(guesses)
        self._call.logits = logits.ctypes.data
        self._run_token(token_id, kv_cache, routes)
        if on_route is not None:
            for place, layer in enumerate(self.args.moe_layers):
                ids = routes[place : place + 1].astype(np.int64)
                on_route(layer, ids, routing_weights[place : place + 1].copy())
        return logits

    def _run_token(self, token_id: int, kv_cache: KVCache, routes: np.ndarray) -> None:
        """One token through the core. After every token the interpreter finds its own memory out of
        the processor's caches, so that each line here costs ten times what it does in a loop."""
        call, position = self._call, kv_cache.offset
        if kv_cache.view is not self._view:
            self._decoder()
            self._view = call.kv = kv_cache.view
        first, end, capacity, cos, sin, _ = self._angles
        if not first <= position < end or capacity != kv_cache.capacity:
            first, end, capacity, cos, sin, _ = self._make_angles(position, kv_cache.capacity)
        offset = (position - first) * self._angle_bytes
        call.token_id, call.cos, call.sin = token_id, cos + offset, sin + offset
        self._kv.position = position
        # Only the main thread is interrupted: the handler runs once the core has returned, and if
        # it raises nothing the token begins anew.
        thread = get_ident()
        if thread != self._thread:
            self._thread, call.on_sigint = thread, thread == _MAIN_THREAD
        while status := self._em_decode(self._handle, self._cache.handle, self._call_address):
            if status != core.ERR_STOPPED:
                raise self._failure(status, routes)
        kv_cache.offset = position + 1

    def _force(self, forced: ForcedRoutes | None) -> ForcedRoutes:
        """Have the core take these routes, None: the routers'; returns where it puts the routes."""
        call, routes, weights = self._call, self._routes, self._routing_weights
        if forced is None:
            call.forced_ids = None
        else:
            ids = np.array(forced[0], dtype=np.int32)
            self._forced = (ids, np.array(forced[1], dtype=np.float32))
            check_routes(*self._forced, self.args, self.experts.table)
            routes, weights = np.zeros_like(ids), np.zeros_like(self._forced[1])
            call.forced_ids, call.forced_weights = (part.ctypes.data for part in self._forced)
            call.num_forced = ids.shape[1]
        call.routes, call.routing_weights = routes.ctypes.data, weights.ctypes.data
        return routes, weights

    def _guess(self, guesses: np.ndarray | None) -> None:
        self._call.guesses = None
        if guesses is not None:
            self._guesses = check_guesses(guesses, self.args)
            self._call.guesses = self._guesses.ctypes.data
            self._call.num_guesses = self._guesses.shape[1]

    def _failure(self, status: int, routes: np.ndarray) -> EdgeMoeError:
        """Why the core ended a token before its end."""
        call, table = self._call, self.experts.table
        if call.failed_key >= 0:
            return table.failure(call.failed_key, status)
        if status == core.ERR_ROOM:
            place = call.num_places - 1
            first_key = table.first_key[self.args.moe_layers[place]]
            return self._cache.no_room((routes[place] + first_key).tolist())
        return EdgeMoeError("the core refused to decode a token", f"status {status}")

    def _make_angles(self, position: int, capacity: int) -> _Angles:
        """The angles of the block of positions that `position` is in."""
        first = position - position % _ANGLE_BLOCK
        angles = self._rotary.angles(first, _ANGLE_BLOCK, capacity)
        cos, sin = (part.ctypes.data for part in angles)
        self._angles = (first, first + _ANGLE_BLOCK, capacity, cos, sin, angles)
        return self._angles

    # ---- the tables ----------------------------------------------------------------------------

    def _decoder(self) -> int:
        if self._handle is None:
            self._handle = self._make()
        return self._handle

    def _make(self) -> int:
        model = model_table(self.args, *self._weights, self.experts.table)
        pool = self._pool.handle if self._pool is not None else None
        handle = core.lib.em_decoder_create(ctypes.byref(model), pool)
        if not handle:
            raise EdgeMoeError("the core refused the sizes of this model's layers")
        self._cache = self.experts.cache
        return handle
