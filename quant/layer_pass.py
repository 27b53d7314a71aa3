"""A text goes through a model one layer at a time, with the experts as their source has them.

In memory are the trunk, the hidden states of N tokens (fp32 `[N, D]`, three times) and, in whoever
asks, the experts at work. Attention and routers run as in an engine.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kv_cache import KVCache
from ..models.causal_lm import CausalLM
from ..models.steps import Routed
from ..runtime import kernels
from ..runtime.format import RecordLayout
from ..runtime.index import ExpertRecord
from ..runtime.kernels import PackedMatrix, ThreadPool
from ..runtime.memory import Pile
from ..runtime.packing import BF16, NUMPY_DTYPES
from ..runtime.records import RecordTable
from .layouts import TrunkItem
from .pack import in_order
from .quantize import quantize, to_16bit
from .store_source import StoreSource, WeightSource


class Share(NamedTuple):
    """The tokens that one expert was given: positions int64 `[n]`, routing weights fp32 `[n]`."""

    expert: int
    tokens: Tensor
    weights: Tensor


class LayerText(NamedTuple):
    """What a text makes of a layer: what goes into its experts `[N, D]`, the share of each
    expert, and one over the length of the hidden states behind the layer, fp32 `[N]`. Good until
    the next."""

    layer: int
    inputs: Tensor
    parts: list[Share]
    scale: Tensor


class _NoExperts:
    """Stands where an engine has its executor; nothing here asks it for an output."""

    cache = None

    def __init__(self, layouts: dict[tuple[int, int], RecordLayout]) -> None:
        records = {key: ExpertRecord(0, layout, (0, 0)) for key, layout in layouts.items()}
        self.table = RecordTable(records)


class LayerPass:
    """The hidden states of some windows of tokens, from layer to layer. Close it."""

    def __init__(
        self,
        source: WeightSource,
        trunk: Sequence[TrunkItem],
        layouts: dict[tuple[int, int], RecordLayout],
        windows: Sequence[Sequence[int]],
        num_threads: int,
    ) -> None:
        self.args = source.args
        self._pool = ThreadPool(num_threads)
        items = {item.name: item for item in trunk}

        def read(name: str, pile: Pile | None) -> np.ndarray | PackedMatrix:
            return _trunk_tensor(source, items[name])

        experts = _NoExperts(layouts)
        self._model = CausalLM(self.args, read, experts, self._pool)
        self._steps = self._model.steps
        size = max(len(window) for window in windows)
        self._kv_cache = KVCache.for_model(self.args, size, 16)
        ends = np.cumsum([len(window) for window in windows]).tolist()
        self._spans = [slice(end - len(ids), end) for end, ids in zip(ends, windows, strict=True)]
        self._x = np.empty((ends[-1], self.args.hidden), dtype=np.float32)
        self.x = torch.from_numpy(self._x)  # the same memory
        for span, ids in zip(self._spans, windows, strict=True):
            self._x[span] = self._steps.embed(np.array(ids))
        self._ids = np.concatenate([np.array(ids, dtype=np.int32) for ids in windows])
        self._routed = Routed.room(self.args, ends[-1])

    @property
    def num_tokens(self) -> int:
        return len(self.x)

    def attend(self, layer: int) -> Routed:
        """Attention of a layer for every window; what goes into its MLP, good until the next."""
        for span in self._spans:
            self._kv_cache.trim(0)
            routed = Routed(*(part[span] for part in self._routed))
            self._steps.attend(layer, self._x[span], self._kv_cache, routed, self._ids[span])
        return self._routed

    def finish(self, layer: int, y: Tensor | None) -> None:
        """Add what the MLP of a layer gives: y `[N, D]` of its experts, None in a dense layer."""
        for span in self._spans:
            routed = Routed(*(part[span] for part in self._routed))
            own = None if y is None else y[span].numpy()
            self._steps.finish(layer, self._x[span], routed, own)

    def add_outputs(
        self,
        source: WeightSource,
        layer: int,
        inputs: Tensor,
        parts: Sequence[Share],
        workers: int,
    ) -> None:
        """Compute the experts of a layer as the source has them, each for its share, and finish."""
        y = torch.zeros_like(self.x)
        outputs = in_order(partial(_output, source, layer, inputs), parts, workers)
        for share, output in zip(parts, outputs, strict=True):
            y.index_add_(0, share.tokens, output)
        self.finish(layer, y)

    def layers(self, source: WeightSource, last: int, workers: int) -> Iterator[LayerText]:
        """Every MoE layer up to `last`, when its experts have been computed and added."""
        for layer in range(last + 1):
            routed = self.attend(layer)
            if layer not in self.args.moe_layers:
                self.finish(layer, None)
                continue
            parts = list(shares(routed, self.args.num_experts))
            inputs = torch.from_numpy(routed.normed)
            self.add_outputs(source, layer, inputs, parts, workers)
            scale = self.x.norm(dim=1).clamp_(min=1e-6).reciprocal_()
            yield LayerText(layer, inputs, parts, scale)

    def close(self) -> None:
        self._model = self._steps = None
        self._pool.close()

    def __enter__(self) -> "LayerPass":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shares(routed: Routed, num_experts: int) -> Iterator[Share]:
    """The share of every expert, in ascending order of tokens."""
    ids = torch.from_numpy(routed.expert_ids).reshape(-1).long()
    order = torch.argsort(ids, stable=True)[int((ids < 0).sum()) :]
    counts = torch.bincount(ids[order], minlength=num_experts).tolist()
    tokens = order // routed.expert_ids.shape[1]
    weights = torch.from_numpy(routed.routing_weights).reshape(-1)[order]
    yield from map(Share, range(num_experts), tokens.split(counts), weights.split(counts))


def _output(source: WeightSource, layer: int, inputs: Tensor, share: Share) -> Tensor:
    """What an expert adds to its tokens, `[n, D]`."""
    if not len(share.tokens):
        return torch.empty((0, inputs.shape[1]))
    gate, up, down = (part.float() for part in source.expert(layer, share.expert))
    output = expert_hidden(inputs[share.tokens], gate, up) @ down.T
    return output.mul_(share.weights[:, None])


def expert_hidden(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate x) * (up x): what goes into down, x `[n, D]` -> `[n, F]`."""
    return torch.nn.functional.silu(x @ gate.T).mul_(x @ up.T)


def _trunk_tensor(source: WeightSource, item: TrunkItem) -> np.ndarray | PackedMatrix:
    """A trunk tensor as the store will hold it."""
    if isinstance(source, StoreSource):
        data = np.concatenate(list(source.trunk_bytes(item.name, 1 << 30)))
        if item.spec is not None:
            rows, cols = item.source.shape
            return PackedMatrix.from_packed(data, rows, cols, item.spec)
        return data.view(NUMPY_DTYPES[item.dtype]).reshape(item.source.shape)
    weight = source.read(item.source)
    if item.spec is not None:
        codes, scales, _ = quantize(weight, item.spec)
        packed = kernels.pack_codes(codes.numpy(), scales.numpy(), None, item.spec)
        return PackedMatrix.from_packed(packed, *weight.shape, item.spec)
    if weight.dtype in (torch.int64, torch.int32):
        return weight.int().numpy()
    if item.dtype != item.source.dtype:
        return to_16bit(weight, "bf16").numpy().view(BF16)
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.uint16).numpy().view(BF16)
    return weight.numpy()
