"""Configurations: released ones parse to their known sizes, whatever is not computed is refused."""

import copy
import json
import subprocess
import sys

import pytest

from edgemoe.models import MODEL_TYPES, load_module, names, parse_config
from edgemoe.runtime.errors import UnsupportedModelError

OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 50304,
}
QWEN2_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
RELEASED = {"olmoe": OLMOE, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE, "mixtral": MIXTRAL}


def num_parameters(config: dict) -> int:
    """Weights of the whole model, counted from the names and shapes that the wiring asks for."""
    args = parse_config(config)
    total = 0
    for shape in names.trunk_shapes(args, load_module(args.model_type).TRUNK).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    experts = len(args.moe_layers) * args.num_experts
    return total + experts * 3 * args.hidden * args.expert_width


@pytest.mark.parametrize(
    "config, billions",
    [(OLMOE, 6.919), (QWEN2_MOE, 14.316), (QWEN3_MOE, 30.532), (MIXTRAL, 46.703)],
    ids=MODEL_TYPES,
)
def test_the_released_sizes_give_the_published_number_of_parameters(config, billions):
    assert num_parameters(config) == pytest.approx(billions * 1e9, rel=5e-5)


def test_olmoe():
    args = parse_config(OLMOE)
    assert (args.num_layers, args.hidden, args.expert_width, args.head_dim) == (16, 2048, 1024, 128)
    assert (args.num_experts, args.top_k, args.norm_topk, args.qk_norm) == (64, 8, False, "whole")
    assert args.clip_qkv is None and args.max_context == 4096 and args.window == (0,) * 16
    assert args.rope.kind == "default" and args.rope.theta == 10000.0
    assert parse_config(OLMOE | {"clip_qkv": 8.0}).clip_qkv == 8.0


def test_qwen2_moe():
    args = parse_config(QWEN2_MOE)
    assert args.attention_bias and not args.output_bias  # `qkv_bias` is not in released files
    assert (args.shared_width, args.dense_width, args.expert_width) == (5632, 0, 1408)
    assert args.moe_layers == tuple(range(24)) and args.window == (0,) * 24
    assert not parse_config(QWEN2_MOE | {"qkv_bias": False}).attention_bias


def test_qwen3_moe():
    args = parse_config(QWEN3_MOE)
    assert (args.num_heads, args.num_kv_heads, args.head_dim) == (32, 4, 128)
    assert args.norm_topk and args.qk_norm == "head" and args.rope.theta == 1e6
    config = {k: v for k, v in QWEN3_MOE.items() if k != "num_experts"}
    assert parse_config(config | {"num_local_experts": 128}) == args  # as transformers 5 writes it


def test_qwen3_coder():
    coder = QWEN3_MOE | {
        "max_position_embeddings": 262144,
        "rope_theta": 10000000,
        "qkv_bias": False,
    }
    coder |= {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "max_window_layers": 28}
    del coder["attention_bias"]
    args = parse_config(coder)
    assert args.max_context == 262144 and args.rope.theta == 1e7
    assert not args.attention_bias and not args.shared_width


def test_mixtral():
    args = parse_config(MIXTRAL)
    assert args.norm_topk and args.head_dim == 128 and args.window == (0,) * 32
    assert parse_config(MIXTRAL | {"sliding_window": 4096}).window == (4096,) * 32
    assert parse_config(MIXTRAL | {"head_dim": None}) == args
    assert parse_config(MIXTRAL | {"num_key_value_heads": None}).num_kv_heads == 32


def test_dense_layers_between():
    args = parse_config(QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 5]})
    assert args.moe_layers == tuple(n for n in range(48) if n % 2 == 1 and n not in (1, 5))
    assert args.dense_width == 6144


def test_sliding_layers_of_qwen2_moe():
    on = QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 5}
    assert parse_config(on).window[:7] == (64, 0, 64, 0, 64, 0, 0)
    kinds = ["full_attention", "sliding_attention"] * 12
    assert parse_config(on | {"layer_types": kinds}).window == (0, 64) * 12


def test_both_spellings_of_rotary_scaling_agree():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    old = QWEN3_MOE | {"rope_scaling": {"type": "yarn", **scaling}}
    new = {k: v for k, v in QWEN3_MOE.items() if not k.startswith("rope")}
    new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6, **scaling}
    assert parse_config(old) == parse_config(new)
    args = parse_config(old)
    assert args.rope.kind == "yarn" and args.max_context == 131072
    assert args.rope.attention_factor == pytest.approx(1.1386294)


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "longrope": {"short_factor": [1.0] * 64, "long_factor": [4.0] * 64, "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_types(kind):
    config = QWEN3_MOE | {"rope_scaling": {"rope_type": kind, **ROPES[kind]}}
    args = parse_config(config)
    assert args.rope.kind == kind and args.rope.rotary_dim == 128
    config["partial_rotary_factor"] = 0.5
    if kind == "longrope":
        config["rope_scaling"] |= {"short_factor": [1.0] * 32, "long_factor": [4.0] * 32}
    assert parse_config(config).rope.rotary_dim == 64


REQUIRED = {
    "olmoe": ("attention_bias", "norm_topk_prob", "intermediate_size", "num_experts"),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob")
    + ("decoder_sparse_step", "use_sliding_window", "num_experts"),
    "qwen3_moe": ("decoder_sparse_step", "moe_intermediate_size", "norm_topk_prob", "num_experts"),
    "mixtral": ("num_local_experts", "intermediate_size"),
}
COMMON = ("hidden_act", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
COMMON += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")
COMMON += ("num_experts_per_tok",)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_missing_key_is_named_and_never_defaulted(model_type):
    for key in COMMON + REQUIRED[model_type]:
        config = copy.deepcopy(RELEASED[model_type])
        del config[key]
        with pytest.raises(UnsupportedModelError, match=f"`{key}` is missing"):
            parse_config(config)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    "key, value, words",
    [
        ("hidden_act", "gelu", "`hidden_act` = `gelu`"),
        ("rope_scaling", {"rope_type": "spiral", "factor": 2.0}, "`rope_type` = `spiral`"),
        ("rope_scaling", {"type": "default", "mrope_section": [8, 4]}, "mrope_section"),
        ("rope_scaling", {"type": "linear"}, "`factor` is missing"),
        ("rope_scaling", {"type": "yarn", "factor": "four"}, "`rope_parameters.factor` = `four`"),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "full_attention"),
        ("partial_rotary_factor", 1.5, "`partial_rotary_factor` = `1.5`"),
        ("quantization_config", {"quant_method": "fp8"}, "`quantization_config` = `fp8`"),
        ("num_nextn_predict_layers", 1, "`num_nextn_predict_layers` = `1`"),
        ("attention_sinks", True, "`attention_sinks` = `True`"),
        ("attn_logit_softcapping", 50.0, "`attn_logit_softcapping` = `50.0`"),
        ("routed_scaling_factor", 2.5, "`routed_scaling_factor` = `2.5`"),
        ("scoring_func", "sigmoid", "`scoring_func` = `sigmoid`"),
        ("layer_types", ["linear_attention"], "`layer_types` = `linear_attention`"),
        ("hidden_size", "big", "`hidden_size` = `big`"),
        ("hidden_size", 2048.5, "`hidden_size` = `2048.5`"),
        ("num_hidden_layers", 0, "`num_hidden_layers` = `0`"),
        ("num_hidden_layers", True, "`num_hidden_layers` = `True`"),
        ("num_key_value_heads", 3, "`num_key_value_heads` = `3`"),
        ("num_experts_per_tok", 1000, "`num_experts_per_tok` = `1000`"),
        ("rms_norm_eps", -1e-5, "`rms_norm_eps` = `-1e-05`"),
        ("vocab_size", None, "`vocab_size` = `None`"),
        ("tie_word_embeddings", "no", "`tie_word_embeddings` = `no`"),
    ],
)
def test_what_is_not_supported_is_named_with_its_value(model_type, key, value, words):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config(RELEASED[model_type] | {key: value})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "config, words",
    [
        (OLMOE | {"head_dim": 64}, "`head_dim` = `64`"),
        (OLMOE | {"clip_qkv": -1.0}, "`clip_qkv` = `-1.0`"),
        (QWEN3_MOE | {"head_dim": 127}, "`head_dim` = `127`"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "`decoder_sparse_step` = `0`"),
        (QWEN3_MOE | {"mlp_only_layers": [48]}, "`mlp_only_layers` = `[48]`"),
        (QWEN3_MOE | {"mlp_only_layers": list(range(48))}, "mlp_only_layers"),
        (QWEN3_MOE | {"qkv_bias": True}, "`qkv_bias` = `True`"),
        (QWEN3_MOE | {"use_qk_norm": False}, "`use_qk_norm` = `False`"),
        (QWEN3_MOE | {"shared_expert_intermediate_size": 64}, "`64`"),
        (QWEN3_MOE | {"norm_topk_prob": 1}, "`norm_topk_prob` = `1`"),
        (QWEN2_MOE | {"use_sliding_window": True, "sliding_window": 0}, "`sliding_window` = `0`"),
        (QWEN2_MOE | {"layer_types": ["sliding_attention"] * 24}, "sliding_attention"),
        (MIXTRAL | {"hidden_size": 4100}, "num_attention_heads"),
        (QWEN3_MOE | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor"),
    ],
)
def test_options_of_one_architecture(config, words):
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config(config)
    assert words in str(caught.value)


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UnsupportedModelError, match="`gpt_oss`.*olmoe, qwen2_moe"):
        parse_config({"model_type": "gpt_oss"})
    with pytest.raises(UnsupportedModelError, match="`model_type` is missing"):
        parse_config({})
    with pytest.raises(UnsupportedModelError, match="not supported"):
        load_module("args")  # a module of this package, but no architecture


def test_names_of_experts_and_routers():
    mixtral, qwen = load_module("mixtral"), load_module("qwen3_moe")
    assert qwen.expert_tensor(3, 7, "up") == "model.layers.3.mlp.experts.7.up_proj.weight"
    assert qwen.fused_gate_up(3) == "model.layers.3.mlp.experts.gate_up_proj"
    assert qwen.fused_down(3) == "model.layers.3.mlp.experts.down_proj"
    assert qwen.router_name(3) == "model.layers.3.mlp.gate.weight"
    assert mixtral.expert_tensor(0, 1, "gate").endswith("block_sparse_moe.experts.1.w1.weight")
    assert mixtral.expert_tensor(0, 1, "up").endswith("experts.1.w3.weight")
    assert mixtral.expert_tensor(0, 1, "down").endswith("experts.1.w2.weight")
    assert mixtral.router_name(2) == "model.layers.2.block_sparse_moe.gate.weight"


def test_parsing_imports_no_torch():
    script = (
        "import sys, json; from edgemoe.models import parse_config, load_module\n"
        "args = parse_config(json.loads(sys.argv[1])); load_module(args.model_type)\n"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, json.dumps(QWEN2_MOE)]
    assert subprocess.run(command, check=False).returncode == 0
