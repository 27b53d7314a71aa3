"""What later routers would say to an earlier residual: the twin of the core's `router` predictor.
Floor 2.

The residual changes little from layer to layer, so a layer's own norm and router applied to the
residual before the MoE half of an earlier layer find most of its experts ("gate lookahead", HOBBIT
2411.01433).
"""

import numpy as np
from numpy.typing import NDArray

from ..kv_cache import KVCache
from ..runtime.kernels import rms_norm
from ..runtime.reference import softmax
from .args import ModelArgs
from .steps import Routed, Steps
from .trunk import LayerWeights


def router_scores(
    args: ModelArgs, layer: int, weights: LayerWeights, x: np.ndarray, ids: np.ndarray
) -> NDArray[np.float32]:
    """What the softmax of a layer's router gives every expert for a residual x `[T, D]` of the
    tokens ids `[T]`, `[T, E]`: of one that several rows stand for, their sum. In a hash-routed
    layer, 0 but for those that the table names."""
    normed = rms_norm(x, weights.post_norm, args.rms_eps)
    shares = softmax(weights.router.linear(normed))
    if weights.experts_of_token is not None:
        given = weights.experts_of_token[ids]
        named = np.zeros_like(shares)
        np.put_along_axis(named, given, np.take_along_axis(shares, given, axis=1), axis=1)
        shares = named
    if layer not in args.bodies:
        return shares
    scores = np.zeros((len(x), args.bodies_of(layer)), dtype=np.float32)
    for row, body in enumerate(args.bodies[layer]):
        if body >= 0:
            scores[:, body] += shares[:, row]
    return scores


def observe_routers(
    layers: Steps, ids: np.ndarray, kv_cache: KVCache, depth: int
) -> tuple[NDArray[np.int32], list[dict[int, NDArray[np.float32]]]]:
    """Append ids `[T]` to the context. Returns the choices [T, places, K], and for each place the
    scores [T, E] that its router gives to the residual of `d` places before, by d = 0 .. depth;
    d = 0 is what it says itself."""
    args = layers.args
    moe_layers = list(args.moe_layers)
    x, routed = layers.embed(ids), Routed.room(args, len(ids))
    routes = np.zeros((len(ids), len(moe_layers), args.top_k), dtype=np.int32)
    scores: list[dict[int, NDArray[np.float32]]] = [{} for _ in moe_layers]
    for layer in range(args.num_layers):
        layers.attend(layer, x, kv_cache, routed, ids)
        y = None
        if layer in moe_layers:
            place = moe_layers.index(layer)
            routes[:, place] = routed.expert_ids
            for ahead, target in enumerate(moe_layers[place : place + depth + 1]):
                found = router_scores(args, target, layers.weights[target], x, ids)
                scores[place + ahead][ahead] = found
            y = layers.experts.run(layer, layers.expert_inputs(layer, routed), *routed[1:])
        layers.finish(layer, x, routed, y)
    kv_cache.advance(len(ids))
    return routes, scores
