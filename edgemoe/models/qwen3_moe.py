"""Qwen3-MoE (`qwen3_moe`): QK-norm per head, dense layers between, renormalised routing weights."""

from collections.abc import Mapping
from typing import Any

from . import names
from .args import ModelArgs
from .config import Config, hash_layers, rope_and_context, sparse_layers

MODEL_TYPE = "qwen3_moe"

# ---- names: module slot -> checkpoint name ------------------------------------------------------

TRUNK: names.Names = {
    **names.EMBEDDINGS,
    **names.ATTENTION,
    **names.ATTENTION_BIAS,
    **names.QK_NORM,
    **names.DENSE_MLP,
    "layer.router": "model.layers.{layer}.mlp.gate.weight",
    "layer.experts_of_token": "model.layers.{layer}.mlp.gate.tid2eid",
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
    # The Coder releases say `qkv_bias` and leave `attention_bias` out; no release has biases.
    bias = values.flag("attention_bias", default=False)
    for key, allowed in (
        ("qkv_bias", bias),
        ("use_qk_norm", True),
        ("shared_expert_intermediate_size", 0),
    ):
        values.only(key, allowed)
    window = 0
    if values.flag("use_sliding_window", default=False) and values.has("sliding_window"):
        window = values.integer("sliding_window")
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
        shared_width=0,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="head",
        clip_qkv=None,
        window=(window,) * num_layers,
        tie_embeddings=values.flag("tie_word_embeddings", default=False),
    )
