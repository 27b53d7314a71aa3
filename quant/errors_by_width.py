"""What every expert's output loses at every width, on real inputs: the fast planner's costs."""

from collections.abc import Sequence
from functools import partial

import torch

from .bitplan import Key
from .layer_pass import LayerPass, Share, expert_hidden
from .layouts import trunk_items
from .options import ConvertOptions
from .pack import in_order
from .progress import Progress
from .store_source import StoreSource, WeightSource

_MAX_TOKENS = 1024  # of an expert; more would say the same


def errors_by_width(
    source: WeightSource,
    variants: StoreSource,
    options: ConvertOptions,
    windows: Sequence[Sequence[int]],
    workers: int,
    progress: Progress,
) -> dict[Key, list[float]]:
    """By (layer, expert), for each of the variants: the sum over the tokens routed to the expert of
    |w (y - y^)|^2 / |x|^2, with y its output in the source, w the routing weight and x the hidden
    state behind the layer."""
    num_variants = len(options.variants)
    layouts = {key: record.layout for key, record in variants.index.records.items()}
    found: dict[Key, list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trunk = trunk_items(source, options, [])
    try:
        with LayerPass(source, trunk, layouts, windows, workers) as text:
            progress.start("errors", len(text.args.moe_layers), unit="layers")
            layers = text.layers(source, text.args.num_layers - 1, workers)
            for layer, inputs, parts, scale in layers:
                work = partial(_errors, source, variants, num_variants, layer, inputs, scale)
                for share, errors in zip(parts, in_order(work, parts, workers), strict=True):
                    found[layer, share.expert] = errors
                progress.advance(1)
    finally:
        torch.set_num_threads(threads)
    return found


def _errors(
    source: WeightSource,
    variants: StoreSource,
    num_variants: int,
    layer: int,
    inputs: torch.Tensor,
    scale: torch.Tensor,
    share: Share,
) -> list[float]:
    count = len(share.tokens)
    if not count:
        return [0.0] * num_variants
    kept = torch.linspace(0, count - 1, min(count, _MAX_TOKENS)).long()
    tokens = share.tokens[kept]
    factors = (share.weights[kept] * scale[tokens])[:, None]
    x = inputs[tokens]
    gate, up, down = (part.float() for part in source.expert(layer, share.expert))
    exact = expert_hidden(x, gate, up) @ down.T
    errors = []
    for variant in range(num_variants):
        number = share.expert * num_variants + variant
        gate, up, down = variants.expert(layer, number)
        lost = (exact - expert_hidden(x, gate, up) @ down.T).mul_(factors)
        errors.append(float(lost.square().sum(dtype=torch.float64)) * count / len(kept))
    return errors
