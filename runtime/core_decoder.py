"""The decoder's structures as ctypes has them; core.py declares the functions. Floor 0."""

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

from . import format as layout


class Format(ctypes.Structure):
    """em_format."""

    _fields_ = [("bits", c_int32), ("group_size", c_int32), ("mode", c_int32)]

    @classmethod
    def of(cls, spec: layout.QuantSpec) -> "Format":
        return cls(spec.bits, spec.group_size, layout.MODES.index(spec.mode))


class Matrix(ctypes.Structure):
    """em_matrix."""

    _fields_ = [
        ("rows", c_int64),
        ("cols", c_int64),
        ("format", Format),
        ("num_parts", c_int32),
        ("packed", c_void_p * 3),
    ]


class Block(ctypes.Structure):
    """em_block."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("qkv", Matrix * 3),
        ("qkv_bias", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("output", Matrix),
        ("output_bias", c_void_p),
        ("window", c_int64),
        ("router", Matrix),
        ("first_key", c_int64),
        ("expert_width", c_int64),
        ("first_stand_in", c_int64),
        ("experts_of_token", c_void_p),
        ("gate_up", Matrix * 2),
        ("down", Matrix),
        ("shared_weight", Matrix),
    ]


class Model(ctypes.Structure):
    """em_model."""

    _fields_ = [
        *((name, c_int64) for name in ("num_layers", "hidden", "num_heads", "num_kv_heads")),
        *((name, c_int64) for name in ("head_dim", "rotary_dim", "top_k")),
        ("qk_norm", c_int32),
        ("renormalise", c_int32),
        ("rms_eps", c_float),
        ("clip", c_float),
        ("embedding", Matrix),
        ("lm_head", Matrix),
        ("norm", c_void_p),
        ("layers", POINTER(Block)),
    ]


class RoutingRule(ctypes.Structure):
    """em_routing."""

    _fields_ = [
        ("active_experts", c_int32),
        ("num_auxiliary", c_int32),
        *((name, c_float) for name in ("top_p", "cold_share", "max_dropped")),
        ("stand_ins", c_int32),
        ("stand_in_after", c_float),
    ]


class RoutingStats(ctypes.Structure):
    """em_routing_stats."""

    _fields_ = [
        (name, c_int64) for name in ("num_routed", "num_active", "num_dropped", "num_stand_ins")
    ]


class KvCache(ctypes.Structure):
    """em_kv_cache."""

    _fields_ = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("capacity", c_int64),
        ("position", c_int64),
        ("kv_bits", c_int64),
    ]


class DecodeArgs(ctypes.Structure):
    """em_decode_args."""

    _fields_ = [
        ("token_id", c_int64),
        ("kv", KvCache),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("stop", c_void_p),
        ("on_sigint", c_int32),
        ("routes", c_void_p),
        ("routing_weights", c_void_p),
        *((name, c_void_p) for name in ("forced_ids", "forced_weights")),
        ("num_forced", c_int64),
        ("prefetch", c_void_p),
        ("guesses", c_void_p),
        ("num_guesses", c_int64),
        ("logits", c_void_p),
        *((name, c_int64) for name in ("best_id", "num_places", "failed_key")),
    ]
