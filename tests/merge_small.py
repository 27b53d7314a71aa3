"""Tiny stores with planted families: experts that are each other's copies in another order."""

from pathlib import Path

import numpy as np
import torch
from tiny_checkpoint import make_checkpoint
from tokenizers_small import CHATML, byte_level, write

from edgemoe.quant.convert import convert
from edgemoe.quant.plan import ConvertOptions

FAMILIES = ((0, 5), (1, 3), (2, 7), (4, 6))  # of 8 experts, in every layer
HIDDEN, WIDTH = 64, 32


def random_body(seed: int, width: int = WIDTH, hidden: int = HIDDEN):
    """(gate [F, D], up [F, D], down [D, F]) fp32."""
    rng = torch.Generator().manual_seed(seed)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return tuple(torch.randn(shape, generator=rng) / shape[1] ** 0.5 for shape in shapes)


def permuted(body, order):
    gate, up, down = body
    return gate[order], up[order], down[:, order]


def output_of(body, x):
    gate, up, down = body
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def family_weights(noise: float = 0.0, row_noise: float = 0.0):
    """Edits checkpoint weights: in every family a member's neurons are those of the first in
    another order, and its row of the router is the first one's, both plus noise of their size."""

    def change(weights) -> None:
        rng = torch.Generator().manual_seed(5)

        def near(weight, size):
            own = torch.randn(weight.shape, generator=rng) * size * weight.float().std()
            return (weight.float() + own).to(weight.dtype)

        for name, weight in weights.items():
            if weight.ndim == 1:
                weight.mul_(4).add_(1)
            else:
                weight.mul_((40 if "mlp.gate." in name else 20) / weight.shape[-1] ** 0.5)
        for layer in range(3):
            router = weights[f"model.layers.{layer}.mlp.gate.weight"]
            names = f"model.layers.{layer}.mlp.experts.{{}}.{{}}_proj.weight"
            for first, *others in FAMILIES:
                for other in others:
                    router[other] = near(router[first], row_noise)
                    order = torch.randperm(WIDTH, generator=rng)
                    parts = [weights[names.format(first, p)] for p in ("gate", "up", "down")]
                    for p, part in zip(("gate", "up", "down"), permuted(parts, order), strict=True):
                        weights[names.format(other, p)] = near(part, noise).contiguous()

    return change


def make_families(
    folder: Path, bits: int = 16, noise: float = 0.0, row_noise: float = 0.0, **config
) -> Path:
    """`folder/families.edgemoe`: 8 experts in each of 3 layers, top-2, and its checkpoint."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_experts": 8,
        "vocab_size": 416,
        "max_position_embeddings": 512,
        "norm_topk_prob": True,
    }
    change = family_weights(noise, row_noise)
    source = make_checkpoint(folder / "source", "olmoe", change=change, **(sizes | config))
    (source / "tokenizer.json").unlink()
    write(source, byte_level(400), CHATML)
    return convert(source, folder / "families.edgemoe", ConvertOptions(bits=bits, group_size=32))


def write_text(path: Path, num_tokens: int = 600, seed: int = 0) -> Path:
    """Token ids as .npy."""
    np.save(path, np.random.default_rng(seed).integers(3, 400, num_tokens))
    return path
