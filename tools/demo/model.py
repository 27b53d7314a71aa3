"""The demo model: a small OLMoE-shaped mixture-of-experts language model, made to train on a CPU.

The shapes and the arithmetic are those of `OlmoeForCausalLM` in transformers (query and key norms
over the whole projection, softmax router without renormalisation, SwiGLU experts, rotary embedding,
tied embeddings), so that `export.py` only has to rename tensors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass
class DemoConfig:
    """Shape of the model; the defaults are the bundled demo."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_experts: int = 32
    top_k: int = 4
    expert_width: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 1024


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32, returned in the dtype asked for."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise the last dimension of `x`."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(dtype)


class _Experts(torch.autograd.Function):
    """All experts of a layer: rows sorted by expert, one matmul per expert and projection.

    Autograd over a Python loop would copy every weight slice's gradient into a full-size buffer;
    writing the backward pass by hand keeps it to the matmuls.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        num_tokens, top_k = ids.shape
        token, inverse, spans = _sort_by_expert(ids, gate_up.shape[0])
        rows = x[token]
        scale = x.new_zeros(token.numel(), 1)
        scale[inverse, 0] = weights.reshape(-1).to(x.dtype)
        hidden = x.new_empty(rows.shape[0], gate_up.shape[1])
        for e, (a, b) in enumerate(spans):
            if b > a:
                torch.mm(rows[a:b], gate_up[e].t(), out=hidden[a:b])
        g, u = hidden.chunk(2, dim=1)
        act = F.silu(g) * u * scale
        out = torch.empty_like(rows)
        for e, (a, b) in enumerate(spans):
            if b > a:
                torch.mm(act[a:b], down[e].t(), out=out[a:b])
        ctx.save_for_backward(rows, hidden, act, scale, gate_up, down, token, inverse)
        ctx.spans, ctx.shape = spans, (num_tokens, top_k)
        return out[inverse].view(num_tokens, top_k, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, hidden, act, scale, gate_up, down, token, inverse = ctx.saved_tensors
        num_tokens, top_k = ctx.shape
        dy = grad.to(rows.dtype)[token]
        d_act = torch.empty_like(act)
        d_down = torch.zeros_like(down)
        for e, (a, b) in enumerate(ctx.spans):
            if b > a:
                torch.mm(dy[a:b], down[e], out=d_act[a:b])
                torch.mm(dy[a:b].t(), act[a:b], out=d_down[e])
        g, u = hidden.chunk(2, dim=1)
        sig = torch.sigmoid(g)
        silu = g * sig
        d_weight = (d_act * silu * u).sum(1, dtype=torch.float32)[inverse].view(num_tokens, top_k)
        d_act = d_act * scale
        d_hidden = torch.cat((d_act * u * (sig + silu - silu * sig), d_act * silu), dim=1)
        d_rows = torch.empty_like(rows)
        d_gate_up = torch.zeros_like(gate_up)
        for e, (a, b) in enumerate(ctx.spans):
            if b > a:
                torch.mm(d_hidden[a:b], gate_up[e], out=d_rows[a:b])
                torch.mm(d_hidden[a:b].t(), rows[a:b], out=d_gate_up[e])
        dx = d_rows[inverse].view(num_tokens, top_k, -1).sum(1)
        return dx, d_gate_up, d_down, None, d_weight


def _sort_by_expert(
    ids: Tensor, num_experts: int, block: int = 64
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Lay the (token, choice) pairs out expert by expert, each expert padded to whole blocks.

    oneDNN compiles a kernel per matmul shape: padding keeps the number of shapes small. A padding
    row repeats token 0 and gets routing weight 0, so it changes neither the result nor a gradient.
    """
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    position = torch.arange(flat.numel()) + shift[flat[order]]
    inverse = torch.empty_like(order)
    inverse[order] = position
    token = order.new_zeros(int(ends[-1]))
    token[position] = order // ids.shape[1]
    bounds = ends.tolist()
    return token, inverse, list(zip([0, *bounds[:-1]], bounds, strict=True))


class Layer(nn.Module):
    """One decoder layer: attention, then the routed experts, each behind a norm and a residual."""

    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        h, e, f = cfg.hidden_size, cfg.num_experts, cfg.expert_width
        self.cfg = cfg
        self.input_norm = RMSNorm(h, cfg.rms_norm_eps)
        self.post_norm = RMSNorm(h, cfg.rms_norm_eps)
        self.q_norm = RMSNorm(h, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(h, cfg.rms_norm_eps)
        self.qkv = nn.Parameter(torch.randn(3, h, h) * h**-0.5)
        self.out = nn.Parameter(torch.randn(h, h) * 0.3 * h**-0.5)
        self.router = nn.Parameter(torch.randn(e, h) * h**-0.5)
        self.gate_up = nn.Parameter(torch.randn(e, 2 * f, h) * h**-0.5)
        self.down = nn.Parameter(torch.randn(e, h, f) * f**-0.5)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], dtype: torch.dtype) -> Any:
        """Return the new residual, the router logits and the chosen expert ids."""
        b, t, h = x.shape
        y = self.input_norm(x, dtype)
        q, k, v = F.linear(y, self.qkv.to(dtype).view(3 * h, h)).chunk(3, dim=-1)
        heads = (b, t, self.cfg.num_heads, -1)
        q = _rotate(self.q_norm(q, dtype).view(heads).transpose(1, 2), rope)
        k = _rotate(self.k_norm(k, dtype).view(heads).transpose(1, 2), rope)
        v = v.view(heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + F.linear(y.reshape(b, t, h), self.out.to(dtype))
        y = self.post_norm(x, dtype).view(b * t, h)
        logits = F.linear(y, self.router.to(dtype)).float()
        weights, ids = logits.softmax(-1).topk(self.cfg.top_k, dim=-1)
        y = _Experts.apply(y, self.gate_up.to(dtype), self.down.to(dtype), ids, weights)
        return x + y.view(b, t, h), logits, ids


class DemoModel(nn.Module):
    """Token ids in, final hidden states out; `logits` applies the tied head."""

    def __init__(self, cfg: DemoConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Parameter(torch.randn(cfg.vocab_size, cfg.hidden_size) * 0.05)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        half = cfg.hidden_size // cfg.num_heads // 2
        freq = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angle = torch.outer(torch.arange(cfg.max_positions, dtype=torch.float32), freq).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(
        self, tokens: Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the final hidden states, and per layer the router logits and expert ids."""
        t = tokens.shape[1]
        rope = (self.cos[:t].to(dtype), self.sin[:t].to(dtype))  # type: ignore[index]
        x = F.embedding(tokens, self.embed)
        logits, ids = [], []
        for layer in self.layers:
            x, layer_logits, layer_ids = layer(x, rope, dtype)
            logits.append(layer_logits)
            ids.append(layer_ids)
        return self.norm(x, dtype), logits, ids

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits of hidden states, in their dtype."""
        return F.linear(hidden, self.embed.to(hidden.dtype))


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary position embedding (the half-split convention of Hugging Face)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def balance_loss(router_logits: list[Tensor], expert_ids: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Load-balancing loss (1 when even, per layer mean) and router z-loss over the whole batch.

    The balance is asked of the batch, not of each sequence, so an expert may still belong to one
    domain.
    """
    balance = router_logits[0].new_zeros(())
    z = router_logits[0].new_zeros(())
    for logits, ids in zip(router_logits, expert_ids, strict=True):
        num_experts = logits.shape[-1]
        share = torch.bincount(ids.reshape(-1), minlength=num_experts).float() / ids.numel()
        balance = balance + num_experts * (share * logits.softmax(-1).mean(0)).sum()
        z = z + logits.logsumexp(-1).square().mean()
    return balance / len(router_logits), z / len(router_logits)


def compile_parts() -> None:
    """Let inductor fuse the small elementwise parts; whole-model compilation gains no more."""
    global _rotate
    RMSNorm.forward = torch.compile(RMSNorm.forward, dynamic=False)  # type: ignore[method-assign]
    _rotate = torch.compile(_rotate, dynamic=False)
