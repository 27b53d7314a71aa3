"""How alike the outputs of a layer's experts are on the same inputs (2407.09590).

Every expert of a layer computes the same tokens, whether the router gives it them or not. Each is
read once, and in memory are one expert and the similarities of its outputs between any two of the N
tokens: E matrices fp32 `[N, N]`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .calibrate import Text
from .layer_pass import expert_hidden
from .merge_bodies import fp32
from .passes import Passes
from .progress import Progress, Silent
from .store_source import WeightSource
from .windows import cut

if TYPE_CHECKING:
    from ..engine import Engine
    from ..runtime.observe import Observation

REPLAY_TOKENS = 1024
_EVERY = 2  # tokens between those whose inputs are kept


def routes_and_inputs(
    engine: "Engine", texts: Sequence[Text], with_inputs: bool
) -> tuple[NDArray[np.int16], dict[int, Tensor]]:
    """The choices [T, places, K] for the beginnings of the texts, T of REPLAY_TOKENS at most, and
    what went into the experts by MoE layer, fp32 `[N, D]`: of every second token. Empty without
    `with_inputs`."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in engine.args.moe_layers}

    def observe(seen: "Observation") -> None:
        parts[seen.layer].append(torch.tensor(seen.x[::_EVERY]))

    if with_inputs:
        engine.observe(observe)
    count = max(2, REPLAY_TOKENS // len(texts))
    windows = [window.ids for text in texts for window in cut(text.ids[:count], engine.context)]
    routes = np.concatenate(Passes(engine).routes(windows))
    return routes, {layer: torch.cat(xs) for layer, xs in parts.items() if xs}


def output_similarities(
    source: WeightSource, inputs: dict[int, Tensor], progress: Progress | None = None
) -> dict[int, NDArray[np.float64]]:
    """Linear centred kernel alignment of the outputs of any two experts, `[E, E]` by layer."""
    progress, num_experts = progress or Silent(), source.args.num_experts
    progress.start("outputs", len(inputs) * num_experts, unit="experts")
    found = {}
    for layer, x in inputs.items():
        kernels = torch.empty((num_experts, len(x) * len(x)))
        for expert in range(num_experts):
            gate, up, down = fp32(source.expert(layer, expert))
            y = expert_hidden(x, gate, up) @ down.T
            y -= y.mean(dim=0)
            kernel = (y @ y.T).reshape(-1)
            kernels[expert] = kernel / kernel.norm().clamp_min(1e-30)
            progress.advance(1)
        alike = (kernels @ kernels.T).clamp(0, 1).double().numpy()
        np.fill_diagonal(alike, 1.0)
        found[layer] = (alike + alike.T) / 2
    return found
