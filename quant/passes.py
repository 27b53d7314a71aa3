"""Texts through the layers of an engine, layer by layer: what calibration and scoring run.

A group of windows goes through one layer before any goes through the next, so that an expert is
read once for the whole group, not once for every 512 tokens. Each window starts with an empty KV
cache; one cache serves all, since a layer's keys are not needed when the next layer runs.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..kv_cache import KVCache
from ..models.steps import Routed, Steps

if TYPE_CHECKING:
    from ..engine import Engine

GROUP_TOKENS = 4096  # 32 MiB of hidden states at a hidden size of 2048


def groups(windows: Sequence[list[int]], num_tokens: int = GROUP_TOKENS) -> list[list[list[int]]]:
    """The windows in runs of about so many tokens."""
    made: list[list[list[int]]] = []
    room = 0
    for ids in windows:
        if len(ids) > room:
            made.append([])
            room = num_tokens
        made[-1].append(ids)
        room -= len(ids)
    return made


class Passes:
    """Runs windows on an engine whose context holds the longest of them."""

    def __init__(self, engine: "Engine") -> None:
        self._engine, args = engine, engine.args
        self._place = {layer: place for place, layer in enumerate(args.moe_layers)}
        self._kv_cache = KVCache.for_model(args, engine.context, engine.config.kv_bits)

    def routes(
        self, windows: Sequence[list[int]], advance: Callable[[int], None] = lambda _: None
    ) -> list[NDArray[np.int16]]:
        """Run a group; the choices of each window, [T, places, K]. `advance` is told tokens."""
        args, total = self._engine.args, sum(map(len, windows))
        shape = len(self._place), args.top_k
        routes = [np.empty((len(ids), *shape), dtype=np.int16) for ids in windows]
        told = 0
        with self._engine.steps() as layers:
            states = [layers.embed(np.array(ids)) for ids in windows]
            for layer in range(args.num_layers):
                for ids, x, chosen in zip(windows, states, routes, strict=True):
                    self._run(layers, layer, np.array(ids), x, chosen)
                done = total * (layer + 1) // args.num_layers
                advance(done - told)
                told = done
        return routes

    def _run(
        self,
        layers: Steps,
        layer: int,
        ids: NDArray[np.integer],
        x: NDArray[np.float32],
        chosen: NDArray[np.int16],
    ) -> None:
        args, chunk, kv_cache = self._engine.args, self._engine.chunk_tokens, self._kv_cache
        kv_cache.trim(0)
        for begin in range(0, len(x), chunk):
            part = x[begin : begin + chunk]
            routed = Routed.room(args, len(part))
            layers.attend(layer, part, kv_cache, routed, ids[begin : begin + chunk])
            y, place = None, self._place.get(layer)
            if place is not None:
                chosen[begin : begin + chunk, place] = routed.expert_ids
                y = layers.experts.run(layer, layers.expert_inputs(layer, routed), *routed[1:])
            layers.finish(layer, part, routed, y)
            kv_cache.advance(len(part))
