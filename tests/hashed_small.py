"""Tiny stores whose first layers are hash-routed: a table gives the experts of a token."""

from pathlib import Path

import torch
from tiny_checkpoint import make_checkpoint
from tokenizers_small import CHATML, byte_level, write

from edgemoe.quant.convert import convert
from edgemoe.quant.plan import ConvertOptions

NUM_LAYERS, NUM_HASHED, NUM_EXPERTS, TOP_K, VOCAB = 5, 3, 8, 2, 416


def random_table(seed: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """[VOCAB, K] different experts each, in no order."""
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(NUM_EXPERTS, generator=rng)[:TOP_K] for _ in range(VOCAB)]
    return torch.stack(rows).to(dtype)


def table_name(layer: int, block: str = "mlp") -> str:
    return f"model.layers.{layer}.{block}.gate.tid2eid"


def make_source(folder: Path, model_type: str = "olmoe", change=None, **config) -> Path:
    """`folder/source`: 8 experts in each of 5 layers, top-2, the first three hash-routed."""
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": NUM_LAYERS,
        "num_hash_layers": NUM_HASHED,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
    }
    count = "num_local_experts" if model_type == "mixtral" else "num_experts"
    width = "intermediate_size" if model_type in ("olmoe", "mixtral") else "moe_intermediate_size"

    def fill(weights) -> None:
        for name, weight in weights.items():
            if name.endswith("tid2eid"):
                weights[name] = random_table(int(name.split(".")[2]))
            elif weight.ndim == 1:
                weight.mul_(4).add_(1)
            else:
                weight.mul_((80 if ".gate." in name else 20) / weight.shape[-1] ** 0.5)
        if change is not None:
            change(weights)

    sizes |= {count: NUM_EXPERTS, width: 64, **config}
    source = make_checkpoint(folder / "source", model_type, change=fill, **sizes)
    (source / "tokenizer.json").unlink()
    write(source, byte_level(400), CHATML)
    return source


def make_store(folder: Path, model_type: str = "olmoe", bits: int = 4, **options) -> Path:
    """`folder/hashed.edgemoe` of such a checkpoint."""
    source = make_source(folder, model_type, **options)
    made = ConvertOptions(bits=bits, trunk_bits=16 if bits == 16 else 8, group_size=32)
    return convert(source, folder / "hashed.edgemoe", made)
