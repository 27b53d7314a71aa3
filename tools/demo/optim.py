"""The optimiser: Muon for the matrices, Adam for embeddings, routers and norms.

Muon replaces the momentum of each matrix by its nearest orthogonal matrix (a few Newton-Schulz
steps in bf16, batched over the experts); its cost is about a tenth of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from model import DemoModel
from torch import Tensor


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz orthogonalisation of a batch of matrices `[n, rows, columns]`."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, poly, x, beta=3.4445)
    return x.mT if tall else x


class DemoOptimizer:
    """One step over all parameters at a relative learning rate between 0 and 1."""

    def __init__(self, model: DemoModel, matrix_lr: float = 0.02, other_lr: float = 3e-3) -> None:
        self.matrix_lr, self.other_lr = matrix_lr, other_lr
        self.matrices: list[tuple[torch.nn.Parameter, tuple[int, int, int]]] = []
        self.others: list[torch.nn.Parameter] = []
        for name, p in model.named_parameters():
            kind = name.rsplit(".", 1)[-1]
            if kind == "gate_up":
                self.matrices.append((p, (p.shape[0] * 2, p.shape[1] // 2, p.shape[2])))
            elif kind in ("qkv", "down"):
                self.matrices.append((p, tuple(p.shape)))  # type: ignore[arg-type]
            elif kind == "out":
                self.matrices.append((p, (1, *p.shape)))  # type: ignore[arg-type]
            else:
                self.others.append(p)
        self.momentum = [torch.zeros_like(p) for p, _ in self.matrices]
        self.adam = torch.optim.Adam(self.others, lr=other_lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, scale: float, momentum: float = 0.95) -> float:
        """Apply the gradients; returns the norm of the Adam group's gradients."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.others, 1.0))
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * scale
        self.adam.step()
        for (p, shape), buffer in zip(self.matrices, self.momentum, strict=True):
            grad = p.grad
            if grad is None:
                continue
            buffer.lerp_(grad, 1 - momentum)
            update = orthogonalise(torch.lerp(grad, buffer, momentum).view(shape))
            gain = max(1.0, shape[1] / shape[2]) ** 0.5
            p.mul_(1 - 0.05 * self.matrix_lr * scale)
            p.add_(update.reshape(p.shape), alpha=-self.matrix_lr * scale * gain)
        for p, _ in self.matrices:
            p.grad = None
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Momentum buffers and Adam state."""
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for mine, saved in zip(self.momentum, state["momentum"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
