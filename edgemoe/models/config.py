"""The strict reading of config.json. No torch.

A class default of another library is not the released value, so a missing key is an error unless
released configurations leave it out. An option that edgemoe does not compute is an error that names
it: a model that runs but computes something else is worse than one that does not run.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..runtime.errors import UnsupportedModelError
from .args import ROPE_KINDS, RopeArgs, unsupported

# Options of other architectures, with the values that mean "off". Any other value changes what the
# model computes; a library that ignores them would run and be wrong.
_OFF: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "attention_sinks": (None, False),
    "add_swa_attention_sink_bias": (None, False),
    "add_full_attention_sink_bias": (None, False),
    "use_sinks": (None, False),
    "num_nextn_predict_layers": (None, 0),
    "mtp_num_hidden_layers": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "router_logit_softcapping": (None, 0, 0.0),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "routed_scaling_factor": (None, 1, 1.0),
    "scoring_func": (None, "softmax"),
    "topk_method": (None, "greedy"),
    "n_group": (None, 0, 1),
    "topk_group": (None, 0, 1),
    "n_shared_experts": (None, 0),
    "num_shared_experts": (None, 0),
    "first_k_dense_replace": (None, 0),
    "moe_layer_freq": (None, 1),
    "kv_lora_rank": (None, 0),
    "q_lora_rank": (None, 0),
    "attn_output_gate": (None, False),
    "attention_chunk_size": (None, 0),
    "full_attention_interval": (None, 1),
    "no_rope_layers": (None, []),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "mlp_bias": (None, False),
    "expert_bias": (None, False),
    "swiglu_limit": (None,),
    "pruned_heads": (None, {}),
    "lm_head_bias": (None, False),
    "tie_encoder_decoder": (None, False),
}


class Config:
    """Typed access to a config.json; every error names the key, its value and what was expected."""

    def __init__(self, values: Mapping[str, Any], model_type: str) -> None:
        self.values = values
        if values.get("model_type") != model_type:
            raise unsupported("model_type", values.get("model_type"), f"expected {model_type}")
        for key, off in _OFF.items():
            if key in values and values[key] not in off:
                value = values[key]
                if isinstance(value, Mapping):
                    value = value.get("quant_method", value)
                raise unsupported(key, value, "edgemoe does not compute this option")
        for kind in values.get("layer_types") or ():
            if kind not in ("full_attention", "sliding_attention"):
                raise unsupported(
                    "layer_types", kind, "edgemoe does not compute this kind of layer"
                )
        if self.text("hidden_act") != "silu":
            raise unsupported("hidden_act", values["hidden_act"], "expected silu")

    def get(self, *keys: str) -> Any:
        """The value of the first of several spellings that is there and not null."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        for key in keys:
            if key in self.values:
                raise unsupported(key, None, "expected a value")
        raise UnsupportedModelError(
            f"`{keys[0]}` is missing from config.json",
            "edgemoe never guesses a size: the defaults of a class are not the released values",
            "add the key from the released config.json",
        )

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, *keys: str, least: int = 1) -> int:
        value = self.get(*keys)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
            raise unsupported(keys[0], value, "expected a whole number")
        if value < least:
            raise unsupported(keys[0], value, f"expected at least {least}")
        return int(value)

    def real(self, *keys: str) -> float:
        return _real(keys[0], self.get(*keys))

    def only(self, key: str, *allowed: object) -> None:
        """Refuse a key that is there with any other value."""
        if self.has(key) and self.values[key] not in allowed:
            raise unsupported(key, self.values[key], f"expected {allowed[0]}")

    def quotient(self, key: str, by: str) -> int:
        value, divisor = self.integer(key), self.integer(by)
        if value % divisor:
            raise unsupported(by, divisor, f"`{key}` {value} is not a multiple of it")
        return value // divisor

    def head_dim(self) -> int:
        """`head_dim`, or where a released configuration has none, hidden size / heads."""
        if not self.has("head_dim"):
            return self.quotient("hidden_size", "num_attention_heads")
        value = self.integer("head_dim")
        if value % 2:
            raise unsupported("head_dim", value, "rotary embedding needs an even number")
        return value

    def kv_heads(self) -> int:
        """`num_key_value_heads`; null says that every head has its own."""
        if "num_key_value_heads" in self.values and not self.has("num_key_value_heads"):
            return self.integer("num_attention_heads")
        return self.integer("num_key_value_heads")

    def flag(self, key: str, default: bool | None = None) -> bool:
        if default is not None and not self.has(key):
            return default
        value = self.get(key)
        if not isinstance(value, bool):
            raise unsupported(key, value, "expected true or false")
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            raise unsupported(key, value, "expected a string")
        return value

    def layers(self, key: str, num_layers: int) -> tuple[int, ...]:
        """A list of layer numbers; absent or null means none."""
        if not self.has(key):
            return ()
        value = self.get(key)
        if not isinstance(value, list) or not all(
            isinstance(layer, int) and 0 <= layer < num_layers for layer in value
        ):
            raise unsupported(key, value, f"expected layer numbers below {num_layers}")
        return tuple(value)

    def choices(self, key: str, num_layers: int, allowed: tuple[str, ...]) -> tuple[str, ...]:
        """One word per layer; absent or null gives ()."""
        if not self.has(key):
            return ()
        value = self.get(key)
        if not isinstance(value, list) or len(value) != num_layers:
            raise unsupported(key, value, f"expected {num_layers} words")
        for word in value:
            if word not in allowed:
                raise unsupported(key, word, f"expected one of {', '.join(allowed)}")
        return tuple(value)


def _real(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise unsupported(key, value, "expected a number")
    if value <= 0:
        raise unsupported(key, value, "expected a number above 0")
    return float(value)


def sparse_layers(config: Config, num_layers: int) -> tuple[int, ...]:
    """The layers with experts, by `decoder_sparse_step` and `mlp_only_layers` (Qwen)."""
    step = config.integer("decoder_sparse_step")
    dense = config.layers("mlp_only_layers", num_layers)
    return tuple(n for n in range(num_layers) if n not in dense and (n + 1) % step == 0)


def hash_layers(config: Config, moe_layers: tuple[int, ...]) -> tuple[int, ...]:
    """The layers whose experts a table gives by token id: the first `num_hash_layers`, or those
    that `mlp_layer_types` calls `hash_moe` (both of DeepSeek-V4); without either, none."""
    layers: tuple[int, ...] = ()
    if config.has("num_hash_layers"):
        count = config.integer("num_hash_layers", least=0)
        layers = tuple(range(min(count, config.integer("num_hidden_layers"))))
    elif "hash_moe" in (kinds := config.values.get("mlp_layer_types") or ()):
        layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "hash_moe")
    if not set(layers) <= set(moe_layers):
        raise unsupported("num_hash_layers", len(layers), "one of these layers has no experts")
    return layers


def rope_and_context(config: Config, head_dim: int) -> tuple[RopeArgs, int]:
    """The rotary embedding and the longest context.

    Reads `rope_parameters` (transformers 5) and the older `rope_theta` with `rope_scaling`.
    """
    positions = config.integer("max_position_embeddings")
    values = dict(config.values.get("rope_parameters") or {})
    values.update(config.values.get("rope_scaling") or {})
    for key in ("rope_theta", "partial_rotary_factor"):
        if values.get(key) is None and config.has(key):
            values[key] = config.get(key)
    unknown = sorted(values.keys() - _ROPE_KEYS)
    if unknown:
        raise unsupported(f"rope_parameters.{unknown[0]}", values[unknown[0]])
    kind = str(values.get("rope_type") or values.get("type") or "default")
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise unsupported("rope_type", kind, f"expected one of {', '.join(ROPE_KINDS)}")

    def real(key: str, default: float | None = None) -> float:
        if values.get(key) is None:
            if default is None:
                raise UnsupportedModelError(
                    f"`{key}` is missing from config.json",
                    f"rotary embedding of type `{kind}` needs it",
                    "add the key from the released config.json",
                )
            return default
        return _real(f"rope_parameters.{key}", values[key])

    rotary_dim = int(head_dim * real("partial_rotary_factor", 1.0))
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise unsupported("partial_rotary_factor", values.get("partial_rotary_factor"))
    fields: dict[str, Any] = {}
    context = positions
    if kind in ("linear", "dynamic", "llama3"):
        fields["factor"] = real("factor")
    if kind in ("dynamic", "llama3", "yarn", "longrope"):
        original = real("original_max_position_embeddings", float(positions))
        if kind == "longrope" and config.has("original_max_position_embeddings"):
            original = config.real("original_max_position_embeddings")
        fields["original_context"] = positions if kind == "dynamic" else int(original)
    if kind == "dynamic":
        context = int(positions * fields["factor"])
    elif kind == "llama3":
        fields["low_freq_factor"] = real("low_freq_factor")
        fields["high_freq_factor"] = real("high_freq_factor")
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise unsupported("rope_parameters.high_freq_factor", fields["high_freq_factor"])
    elif kind == "yarn":
        factor = real("factor", positions / fields["original_context"])
        context = max(positions, int(factor * fields["original_context"]))
        scaled = _yarn_scale(factor, 1.0)
        if values.get("mscale") and values.get("mscale_all_dim"):
            scaled = _yarn_scale(factor, real("mscale"))
            scaled /= _yarn_scale(factor, real("mscale_all_dim"))
        fields["factor"] = factor
        fields["attention_factor"] = real("attention_factor", scaled)
        fields["beta_fast"], fields["beta_slow"] = real("beta_fast", 32.0), real("beta_slow", 1.0)
        fields["truncate"] = bool(values.get("truncate", True))
    elif kind == "longrope":
        factor = real("factor", positions / fields["original_context"])
        scaled = 1.0
        if factor > 1:
            scaled = math.sqrt(1 + math.log(factor) / math.log(fields["original_context"]))
        fields["attention_factor"] = real("attention_factor", scaled)
        for key in ("short_factor", "long_factor"):
            numbers = values.get(key)
            if not isinstance(numbers, list) or len(numbers) != rotary_dim // 2:
                raise unsupported(f"rope_parameters.{key}", numbers, f"{rotary_dim // 2} numbers")
            fields[key] = tuple(_real(f"rope_parameters.{key}", number) for number in numbers)
    return RopeArgs(kind, real("rope_theta"), rotary_dim, **fields), context


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_ROPE_KEYS |= {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
_ROPE_KEYS |= {"mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"}
_ROPE_KEYS |= {"short_factor", "long_factor"}
