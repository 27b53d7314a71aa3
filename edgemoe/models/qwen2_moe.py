"""Qwen1.5/2-MoE (`qwen2_moe`): a shared expert behind a sigmoid, query/key/value biases."""

from collections.abc import Mapping
from typing import Any

from . import names
from .args import ModelArgs
from .config import Config, hash_layers, rope_and_context, sparse_layers

MODEL_TYPE = "qwen2_moe"

# ---- names: module slot -> checkpoint name ------------------------------------------------------

TRUNK: names.Names = {
    **names.EMBEDDINGS,
    **names.ATTENTION,
    **names.ATTENTION_BIAS,
    **names.DENSE_MLP,
    "layer.router": "model.layers.{layer}.mlp.gate.weight",
    "layer.experts_of_token": "model.layers.{layer}.mlp.gate.tid2eid",
    "layer.shared_gate": "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
    "layer.shared_up": "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
    "layer.shared_down": "model.layers.{layer}.mlp.shared_expert.down_proj.weight",
    "layer.shared_weight": "model.layers.{layer}.mlp.shared_expert_gate.weight",
}
EXPERTS = names.EXPERTS
expert_tensor = EXPERTS.tensor
fused_gate_up = EXPERTS.gate_up_of
fused_down = EXPERTS.down_of


def router_name(layer: int) -> str:
    return names.spellings(TRUNK, "layer.router", layer)[0]


# ---- config.json --------------------------------------------------------------------------------


def parse(config: Mapping[str, Any]) -> ModelArgs:
    """Raises UnsupportedModelError naming the key that is missing or not supported."""
    values = Config(config, MODEL_TYPE)
    num_layers = values.integer("num_hidden_layers")
    moe_layers = sparse_layers(values, num_layers)
    head_dim = values.head_dim()
    rope, max_context = rope_and_context(values, head_dim)
    return ModelArgs(
        model_type=MODEL_TYPE,
        num_layers=num_layers,
        hidden=values.integer("hidden_size"),
        num_heads=values.integer("num_attention_heads"),
        num_kv_heads=values.kv_heads(),
        head_dim=head_dim,
        vocab=values.integer("vocab_size"),
        max_context=max_context,
        rms_eps=values.real("rms_norm_eps"),
        rope=rope,
        num_experts=values.integer("num_experts", "num_local_experts"),
        top_k=values.integer("num_experts_per_tok"),
        expert_width=values.integer("moe_intermediate_size"),
        norm_topk=values.flag("norm_topk_prob"),
        moe_layers=moe_layers,
        hash_layers=hash_layers(values, moe_layers),
        dense_width=values.integer("intermediate_size") if len(moe_layers) < num_layers else 0,
        shared_width=values.integer("shared_expert_intermediate_size"),
        # Released configurations leave `qkv_bias` out: their weights have the three biases.
        attention_bias=values.flag("qkv_bias", default=True),
        output_bias=False,
        qk_norm="none",
        clip_qkv=None,
        window=_windows(values, num_layers),
        tie_embeddings=values.flag("tie_word_embeddings", default=False),
    )


def _windows(values: Config, num_layers: int) -> tuple[int, ...]:
    """The sliding window per layer: `layer_types`, or even layers below `max_window_layers`."""
    if not values.flag("use_sliding_window"):
        values.choices("layer_types", num_layers, ("full_attention",))
        return (0,) * num_layers
    window = values.integer("sliding_window")
    kinds = values.choices("layer_types", num_layers, ("full_attention", "sliding_attention"))
    if not kinds:
        last = values.integer("max_window_layers", least=0)
        return tuple(window if n % 2 == 0 and n < last else 0 for n in range(num_layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
