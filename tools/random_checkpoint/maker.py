"""Makes the tensors of a random model in order, running tokens through what is made."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from edgemoe.models import load_module
from edgemoe.models.names import layer_slots, spellings

from . import model
from .tokenizer import SPECIAL

NUM_CALIBRATION = 512  # tokens whose mean calibrates the routers
NUM_MEASURED = 384  # tokens after them, on which hit rates are counted
_ROWS = 4096  # of the embedding and the head, made at once

Expert = list[Tensor]  # gate [F, D], up [F, D], down [D, F]


class Routing(NamedTuple):
    """What the experts of a layer see: x [T, D], ids and weights [T, K]."""

    x: Tensor
    ids: Tensor
    weights: Tensor


class Maker:
    """One model, from the embedding to the head; `hidden` [T, D] is what the tokens have become.

    Call `embedding`, then for every layer `attention`, `routing` and `mix`, then `head`.
    """

    def __init__(self, config: dict[str, object], seed: int, threads: int) -> None:
        self.module = load_module(str(config["model_type"]))
        self.args = self.module.parse(config)
        self.gaussian = model.Gaussian(seed)
        self.pool = ThreadPoolExecutor(threads)
        self.threads = threads
        generator = torch.Generator().manual_seed(seed)
        count = NUM_CALIBRATION + NUM_MEASURED
        self.tokens = torch.randint(self.args.vocab - len(SPECIAL), (count,), generator=generator)
        self.hidden = torch.empty(count, self.args.hidden)

    def names(self, layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Slot of each trunk tensor of a layer -> its released name and shape."""
        return {
            slot: (spellings(self.module.TRUNK, slot, layer)[0], shape)
            for slot, shape in layer_slots(self.args, layer)
        }

    def expert_shapes(self, layer: int, expert: int) -> dict[str, tuple[int, ...]]:
        """Released names and shapes of one expert, in the order of `Expert`."""
        wide, tall = self._expert_shapes()
        kinds = (("gate", wide), ("up", wide), ("down", tall))
        return {self.module.expert_tensor(layer, expert, proj): shape for proj, shape in kinds}

    def _expert_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        args = self.args
        return (args.expert_width, args.hidden), (args.hidden, args.expert_width)

    def embedding(self) -> Iterator[Tensor]:
        """The embedding in runs of rows; begins the hidden states of the tokens."""
        args = self.args
        common = self.gaussian.matrix((args.hidden,), model.EMBED_RMS, 0, 0)
        for begin in range(0, args.vocab, _ROWS):
            rows = min(_ROWS, args.vocab - begin)
            noise = self.gaussian.matrix((rows, args.hidden), model.EMBED_RMS, 0, 1, begin)
            block = (noise.float() + common.float()).to(torch.bfloat16)
            mine = (self.tokens >= begin) & (self.tokens < begin + rows)
            self.hidden[mine] = block[self.tokens[mine] - begin].float()
            yield block

    def attention(self, layer: int) -> dict[str, Tensor]:
        """The trunk tensors of a layer by slot, the router uncalibrated; runs the attention."""
        made: dict[str, Tensor] = {}
        for number, (slot, (_, shape)) in enumerate(self.names(layer).items()):
            if len(shape) == 1:
                made[slot] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                std = model.unit_std(shape[1])
                made[slot] = self.gaussian.matrix(shape, std, 1, layer, number)
        x = model.rms_norm(self.hidden, self.args.rms_eps)
        names = ("layer.q", "layer.k", "layer.v")
        inner = model.attention_inner(self.args, x, *(made[name] for name in names))
        scale = model.BLOCK_RMS / float(inner.square().mean().sqrt())
        made["layer.o"] = (made["layer.o"].float() * scale).to(torch.bfloat16)
        self.hidden += inner @ made["layer.o"].float().T
        return made

    def routing(self, made: dict[str, Tensor]) -> Routing:
        """Calibrate the router in `made`; returns where it sends the tokens."""
        x = model.rms_norm(self.hidden, self.args.rms_eps)
        router = model.calibrate_router(made["layer.router"], x[:NUM_CALIBRATION])
        made["layer.router"] = router
        return Routing(x, *model.route(self.args, router, x))

    def experts(self, layer: int, num_experts: int, down: float) -> Iterator[Expert]:
        """Experts in order; the next ones are made meanwhile. `down`: std of the down matrices."""
        wide, tall = self._expert_shapes()
        std = model.unit_std(self.args.hidden)

        def make(expert: int) -> Expert:
            kinds = ((wide, std), (wide, std), (tall, down))
            return [
                self.gaussian.matrix(shape, spread, 2, layer, expert, proj)
                for proj, (shape, spread) in enumerate(kinds)
            ]

        waiting = [self.pool.submit(make, e) for e in range(min(self.threads, num_experts))]
        for expert in range(num_experts):
            matrices = waiting.pop(0).result()
            if expert + self.threads < num_experts:
                waiting.append(self.pool.submit(make, expert + self.threads))
            yield matrices
            del matrices

    def mix(self, layer: int, routing: Routing, experts: Iterable[Expert]) -> Iterator[Expert]:
        """Run each expert on its tokens and hand it on; the layer is done after the last."""
        total = torch.zeros_like(self.hidden)
        for expert, matrices in enumerate(experts):
            token, slot = (routing.ids == expert).nonzero(as_tuple=True)
            out = model.expert_output(routing.x[token], *matrices)
            total.index_add_(0, token, out * routing.weights[token, slot, None])
            yield matrices
        self.hidden += total
        if not torch.isfinite(self.hidden).all():
            raise AssertionError(f"layer {layer}: hidden states are not finite")

    def hit_rates(self, routing: Routing) -> list[float]:
        """Of an LRU of 1/4, 1/2 and 3/4 of the experts, on tokens that calibrated nothing."""
        capacities = [self.args.num_experts * quarters // 4 for quarters in (1, 2, 3)]
        return [model.lru_hit_rate(routing.ids, size, NUM_CALIBRATION) for size in capacities]

    def head(self) -> Iterator[Tensor]:
        """The output head in runs of rows."""
        args = self.args
        mean = model.rms_norm(self.hidden, args.rms_eps).mean(0)
        mean /= mean.norm()
        std = model.LOGIT_STD / sqrt(args.hidden)
        for begin in range(0, args.vocab, _ROWS):
            shape = (min(_ROWS, args.vocab - begin), args.hidden)
            block = self.gaussian.matrix(shape, std, 3, begin).float()
            yield (block - torch.outer(block @ mean, mean)).to(torch.bfloat16)
