"""Random weights that behave: residuals stay finite, routing is as uneven as in real models.

Routing. Random routers are uniform if hidden states have no common component, and far too uneven if
they have a large one. Here they have one: an embedding is a common direction plus noise of the
token. With µ the mean input of a router W, b = Wµ is what every token adds to its logits. The part
of W along µ is scaled until the standard deviation of b over the experts is `SKEW` times the mean
standard deviation of a logit over the tokens; later layers see the outputs of the corrected ones.
At .55 and 8 of 64 experts, LRU caches of 16, 32 and 48 experts hit about .36, .70 and .90 of the
time, as in recorded routings of trained models. Tokens are random, so popularity is all the
locality there is; real text has more.

Residuals. Each block adds a vector of `BLOCK_RMS`, whatever its widths and routing weights are, so
that hidden states grow like the square root of the depth. The head has no part along the mean of
the last hidden state: it would make every token predict the same next one.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import prod, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgemoe.models.args import ModelArgs

SKEW = 0.55
EMBED_RMS = 0.05  # of the common direction, and of the noise of a token
BLOCK_RMS = 0.02
LOGIT_STD = 2.0
_BLOCK = 1 << 20


class Gaussian:
    """Normal bf16 matrices; the same key gives the same values, in any order and on any thread."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def matrix(self, shape: Sequence[int], std: float, *key: int) -> Tensor:
        """A bf16 tensor of `shape`, filled block by block."""
        generator = np.random.Generator(np.random.SFC64([self._seed, *key]))
        out = torch.empty(prod(shape), dtype=torch.bfloat16)
        buffer = np.empty(min(_BLOCK, out.numel()), np.float32)
        for begin in range(0, out.numel(), _BLOCK):
            part = out[begin : begin + _BLOCK]
            block = buffer[: part.numel()]
            generator.standard_normal(out=block, dtype=np.float32)
            block *= std
            part.copy_(torch.from_numpy(block))
        return out.view(*shape)


def unit_std(cols: int) -> float:
    """The standard deviation with which a matrix keeps the size of a normalised input."""
    return 1.0 / sqrt(cols)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Every norm weight is 1."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def attention_inner(args: ModelArgs, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the output projection sees: causal attention over x [T, D] -> [T, heads * head_dim]."""
    num_tokens = x.shape[0]
    queries, keys, values = x @ q.float().T, x @ k.float().T, x @ v.float().T
    if args.qk_norm == "whole":
        queries, keys = rms_norm(queries, args.rms_eps), rms_norm(keys, args.rms_eps)
    queries, keys, values = (
        part.view(num_tokens, -1, args.head_dim).transpose(0, 1) for part in (queries, keys, values)
    )
    if args.qk_norm == "head":
        queries, keys = rms_norm(queries, args.rms_eps), rms_norm(keys, args.rms_eps)
    queries, keys = _rotate(queries, args), _rotate(keys, args)
    out = F.scaled_dot_product_attention(
        queries[None], keys[None], values[None], is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(num_tokens, -1)


def _rotate(x: Tensor, args: ModelArgs) -> Tensor:
    half = args.head_dim // 2
    frequency = args.rope.theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def calibrate_router(router: Tensor, x: Tensor, skew: float = SKEW) -> Tensor:
    """Scale the part of `router` [E, D] along the mean of x [T, D]; see the module docstring."""
    weight, mean = router.float(), x.mean(0)
    along = torch.outer(weight @ mean, mean) / mean.dot(mean)
    across = weight - along
    factor = 1.0
    for _ in range(20):  # the part along µ also carries some of the tokens' spread
        scaled = across + factor * along
        logits = x @ scaled.T
        factor *= skew * float(logits.std(0).mean() / (scaled @ mean).std())
    return (across + factor * along).to(router.dtype)


def route(args: ModelArgs, router: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Expert ids and routing weights, both [T, K]."""
    probabilities = torch.softmax(x @ router.float().T, dim=-1)
    weights, ids = probabilities.topk(args.top_k, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True) if args.norm_topk else weights


def expert_output(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert on its tokens x [t, D]."""
    inner = F.silu(x @ gate.float().T) * (x @ up.float().T)
    return inner @ down.float().T


def down_std(args: ModelArgs, weights: Tensor) -> float:
    """The spread of down matrices that makes the routed sum `BLOCK_RMS` large."""
    inner_rms = 0.596 * sqrt(args.expert_width)  # .596: rms of silu(a) * b, a and b normal
    return BLOCK_RMS / (inner_rms * float(weights.square().sum(-1).mean().sqrt()))


def lru_hit_rate(ids: Tensor, capacity: int, num_warm: int) -> float:
    """Hit rate of an LRU of `capacity` experts on ids [T, K], counted after `num_warm` tokens."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for number, chosen in enumerate(ids.tolist()):
        for expert in chosen:
            hits += number >= num_warm and expert in cached
            cached[expert] = None
            cached.move_to_end(expert)
            if len(cached) > capacity:
                cached.popitem(last=False)
    return hits / (ids[num_warm:].numel())
