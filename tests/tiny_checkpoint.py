"""Tiny random checkpoints of every architecture, in every layout, written with safetensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgemoe.models import load_module
from edgemoe.models.names import trunk_shapes

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128,
}
_QWEN: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_experts": 4,
    "use_sliding_window": False,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {
        "attention_bias": False,
        "intermediate_size": 32,
        "norm_topk_prob": False,
        "num_experts": 4,
    },
    "qwen2_moe": {**_QWEN, "mlp_only_layers": [1], "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_QWEN, "mlp_only_layers": [], "head_dim": 32, "attention_bias": False},
    "mixtral": {"intermediate_size": 32, "num_local_experts": 4},
}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small but complete config.json."""
    return {"model_type": model_type, **_COMMON, **CONFIGS[model_type], **changes}


def weights_of(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0, fused: bool = False
) -> dict[str, Tensor]:
    """Every tensor by name; the same values whatever the layout."""
    module = load_module(config["model_type"])
    args = module.parse(config)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    weights = {}
    for spellings, shape in trunk_shapes(args, module.TRUNK).items():
        weights[spellings[-1] if fused else spellings[0]] = random(*shape)
    for layer in args.moe_layers:
        experts = [
            {
                "gate": random(args.expert_width, args.hidden),
                "up": random(args.expert_width, args.hidden),
                "down": random(args.hidden, args.expert_width),
            }
            for _ in range(args.num_experts)
        ]
        if fused:
            both = [torch.cat((expert["gate"], expert["up"])) for expert in experts]
            weights[module.fused_gate_up(layer)] = torch.stack(both)
            weights[module.fused_down(layer)] = torch.stack([expert["down"] for expert in experts])
            continue
        for number, expert in enumerate(experts):
            for proj, weight in expert.items():
                weights[module.expert_tensor(layer, number, proj)] = weight
    return weights


def write_checkpoint(
    path: Path, config: dict[str, Any], weights: dict[str, Tensor], num_shards: int = 1
) -> Path:
    """Write a checkpoint folder: one file, or shards and their index."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    if num_shards == 1:
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path
    names = sorted(weights)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_checkpoint(
    path: Path,
    model_type: str = "olmoe",
    dtype: torch.dtype = torch.bfloat16,
    fused: bool = False,
    num_shards: int = 1,
    change: Callable[[dict[str, Tensor]], None] | None = None,
    **config_changes: Any,
) -> Path:
    """A whole tiny checkpoint; `change` edits the weights before they are written."""
    config = config_of(model_type, **config_changes)
    weights = weights_of(config, dtype, fused=fused)
    if change:
        change(weights)
    return write_checkpoint(path, config, weights, num_shards)
