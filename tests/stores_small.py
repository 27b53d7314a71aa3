"""A tiny random OLMoE store with a real tokenizer, made by the converter, for engine tests."""

from pathlib import Path

from tiny_checkpoint import make_checkpoint
from tokenizers_small import CHATML, byte_level, write

from edgemoe.quant.convert import convert
from edgemoe.quant.plan import ConvertOptions


def make_store(
    folder: Path, bits: int = 4, template: str | None = CHATML, tokenizer: bool = True, **config
) -> Path:
    """`folder/tiny.edgemoe`: 8 experts in each of 3 layers, top-2, a context of 512."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_experts": 8,
        "vocab_size": 416,  # padded above the tokenizer's 400, as real ones are
        "max_position_embeddings": 512,
    }

    def sharpen(weights) -> None:
        for name, weight in weights.items():
            if weight.ndim == 1:
                weight.mul_(4).add_(1)
            else:  # unit variance and decided routers, so that greedy answers wander
                weight.mul_((80 if "mlp.gate." in name else 20) / weight.shape[-1] ** 0.5)

    source = make_checkpoint(folder / "source", "olmoe", change=sharpen, **(sizes | config))
    (source / "tokenizer.json").unlink()
    if tokenizer:
        write(source, byte_level(400), template)
    return convert(source, folder / "tiny.edgemoe", ConvertOptions(bits=bits, group_size=32))
