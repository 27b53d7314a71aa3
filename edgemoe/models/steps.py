"""The layers in steps: embed, then for each layer attend, ask for the experts, finish. Floor 2.

A prompt goes through all layers at once (`run`). Whoever needs one layer of many texts before the
next layer of any (calibration) calls the steps.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..kv_cache import KVCache
from ..runtime.errors import UsageError
from .args import ModelArgs
from .moe import Experts, OnRoute
from .trunk import LayerWeights

# Recorded routes: expert ids int32 [layers with experts, K'], ascending, then -1, and routing
# weights fp32 of one token; of T tokens [T, layers with experts, K'].
ForcedRoutes = tuple[np.ndarray, np.ndarray]


class Routed(NamedTuple):
    """What goes into the MLP of a layer: normed `[T, D]`; expert_ids int32 `[T, K]`, ascending,
    then -1, and routing_weights fp32 `[T, K]`, of no meaning in a layer without a router."""

    normed: np.ndarray
    expert_ids: np.ndarray
    routing_weights: np.ndarray

    @classmethod
    def room(cls, args: ModelArgs, num_tokens: int) -> "Routed":
        """Memory for as many tokens."""
        return cls(
            np.empty((num_tokens, args.hidden), dtype=np.float32),
            np.empty((num_tokens, args.top_k), dtype=np.int32),
            np.empty((num_tokens, args.top_k), dtype=np.float32),
        )


class Steps(Protocol):
    """All layers of a model; x `[T, D]` is changed in place."""

    args: ModelArgs
    experts: Experts
    weights: Sequence[LayerWeights]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """ids `[T]` -> x `[T, D]`. Raises UsageError as `check_token_ids`."""
        ...

    def attend(
        self, layer: int, x: np.ndarray, kv_cache: KVCache, routed: Routed, ids: np.ndarray
    ) -> None:
        """Add the attention of a layer to x of the tokens ids `[T]`, whose keys and values go into
        the KV cache at its offset, and fill in `routed`."""
        ...

    def expert_inputs(self, layer: int, routed: Routed) -> np.ndarray:
        """What the experts of a layer take, `[T, D]`, of the tokens that it attended to last."""
        ...

    def finish(self, layer: int, x: np.ndarray, routed: Routed, y: np.ndarray | None) -> None:
        """Add the experts' y `[T, D]` and a shared expert, or the dense MLP (y None), to x."""
        ...


def check_token_ids(low: int, high: int, vocab: int) -> None:
    """Raises UsageError where the lowest or highest id is not of the vocabulary."""
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise UsageError(f"token id {wrong} is not in the vocabulary", f"expected 0 to {vocab - 1}")


def run(
    layers: Steps,
    ids: np.ndarray,
    kv_cache: KVCache,
    on_route: OnRoute | None,
    forced: ForcedRoutes | None = None,
) -> np.ndarray:
    """Append the tokens ids `[T]` to the context; returns x `[T, D]` behind the last layer.

    `forced`: routes of these tokens in the place of the routers', which run all the same.
    """
    place = {layer: number for number, layer in enumerate(layers.args.moe_layers)}
    x = layers.embed(ids)
    routed = Routed.room(layers.args, len(ids))
    for layer in range(layers.args.num_layers):
        layers.attend(layer, x, kv_cache, routed, ids)
        y = None
        if layer in place:
            expert_ids, weights = routed.expert_ids, routed.routing_weights
            if forced is not None:
                expert_ids, weights = (part[:, place[layer]] for part in forced)
            if on_route is not None:
                on_route(layer, expert_ids.astype(np.int64), weights.copy())
            inputs = layers.expert_inputs(layer, routed)
            y = layers.experts.run(layer, inputs, expert_ids, weights)
        layers.finish(layer, x, routed, y)
    kv_cache.advance(len(ids))
    return x
