"""OLMoE (`olmoe`): QK-norm over the whole projection, optional clipping, no renormalisation."""

from collections.abc import Mapping
from typing import Any

from . import names
from .args import ModelArgs, unsupported
from .config import Config, hash_layers, rope_and_context

MODEL_TYPE = "olmoe"

# ---- names: module slot -> checkpoint name ------------------------------------------------------

TRUNK: names.Names = {
    **names.EMBEDDINGS,
    **names.ATTENTION,
    **names.ATTENTION_BIAS,
    **names.QK_NORM,
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
    hidden, num_heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    num_layers = values.integer("num_hidden_layers")
    head_dim = values.head_dim()
    if head_dim * num_heads != hidden:
        raise unsupported("head_dim", head_dim, "the query norm spans the hidden size")
    rope, max_context = rope_and_context(values, head_dim)
    bias = values.flag("attention_bias")
    return ModelArgs(
        model_type=MODEL_TYPE,
        num_layers=num_layers,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=values.kv_heads(),
        head_dim=head_dim,
        vocab=values.integer("vocab_size"),
        max_context=max_context,
        rms_eps=values.real("rms_norm_eps"),
        rope=rope,
        num_experts=values.integer("num_experts", "num_local_experts"),
        top_k=values.integer("num_experts_per_tok"),
        expert_width=values.integer("intermediate_size"),
        norm_topk=values.flag("norm_topk_prob"),
        moe_layers=tuple(range(num_layers)),
        hash_layers=hash_layers(values, tuple(range(num_layers))),
        dense_width=0,
        shared_width=0,
        attention_bias=bias,
        output_bias=bias,
        qk_norm="whole",
        clip_qkv=values.real("clip_qkv") if values.has("clip_qkv") else None,
        window=(0,) * num_layers,
        tie_embeddings=values.flag("tie_word_embeddings", default=False),
    )
