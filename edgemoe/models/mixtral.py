"""Mixtral (`mixtral`): few wide experts `w1`, `w3`, `w2`, always renormalised routing weights."""

from collections.abc import Mapping
from typing import Any

from . import names
from .args import ModelArgs
from .config import Config, hash_layers, rope_and_context

MODEL_TYPE = "mixtral"

# ---- names: module slot -> checkpoint name ------------------------------------------------------

TRUNK: names.Names = {
    **names.EMBEDDINGS,
    **names.ATTENTION,
    # The fused layout renames the whole block, so its router has another name too.
    "layer.router": (
        "model.layers.{layer}.block_sparse_moe.gate.weight",
        "model.layers.{layer}.mlp.gate.weight",
    ),
    "layer.experts_of_token": (
        "model.layers.{layer}.block_sparse_moe.gate.tid2eid",
        "model.layers.{layer}.mlp.gate.tid2eid",
    ),
}
EXPERTS = names.ExpertNames(
    gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
    up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
)
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
    head_dim = values.head_dim()
    rope, max_context = rope_and_context(values, head_dim)
    window = values.integer("sliding_window") if values.has("sliding_window") else 0
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
        num_experts=values.integer("num_local_experts", "num_experts"),
        top_k=values.integer("num_experts_per_tok"),
        expert_width=values.integer("intermediate_size"),
        norm_topk=True,
        moe_layers=tuple(range(num_layers)),
        hash_layers=hash_layers(values, tuple(range(num_layers))),
        dense_width=0,
        shared_width=0,
        attention_bias=False,
        output_bias=False,
        qk_norm="none",
        clip_qkv=None,
        window=(window,) * num_layers,
        tie_embeddings=values.flag("tie_word_embeddings", default=False),
    )
