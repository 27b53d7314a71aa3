"""What a model is, in numbers: `ModelArgs` and `RopeArgs`. No torch; `config.py` fills them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..runtime.errors import UnsupportedModelError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
QK_NORMS = ("none", "head", "whole")


@dataclass(frozen=True, slots=True)
class RopeArgs:
    """Rotary position embedding; `rope.py` turns it into angles.

    `attention_factor` multiplies cosine and sine. `original_context` is the trained length.
    """

    kind: str
    theta: float
    rotary_dim: int
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """Everything the wiring needs. Widths are 0 and `clip_qkv` is None where the part is absent."""

    model_type: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_context: int
    rms_eps: float
    rope: RopeArgs
    num_experts: int
    top_k: int
    expert_width: int
    norm_topk: bool
    moe_layers: tuple[int, ...]
    dense_width: int
    shared_width: int
    attention_bias: bool  # of the query, key and value projections
    output_bias: bool  # of the attention's output projection
    qk_norm: str
    clip_qkv: float | None
    window: tuple[int, ...]  # per layer; 0: every earlier token is seen
    tie_embeddings: bool
    hidden_act: str = "silu"
    hash_layers: tuple[int, ...] = ()  # whose experts a table gives by token id (2106.04426)
    # By layer, of a store that was made of a pruned set; empty: `num_experts` each.
    kept_experts: Mapping[int, int] = field(default_factory=dict, hash=False)
    # By layer of a store of merged experts: the expert of every row of the router, -1: none.
    bodies: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, "num_key_value_heads", self.num_kv_heads)
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim)
        _require(self.top_k <= self.num_experts, "num_experts_per_tok", self.top_k)
        _require(bool(self.moe_layers), "mlp_only_layers", "no layer has experts")
        _require(self.qk_norm in QK_NORMS, "qk_norm", self.qk_norm)
        _require(len(self.window) == self.num_layers, "layer_types", len(self.window))

    def experts_of(self, layer: int) -> int:
        """What a router chooses among: `num_experts`, or fewer in a store that was made of a
        pruned set."""
        return self.kept_experts.get(layer, self.num_experts)

    def bodies_of(self, layer: int) -> int:
        """Experts that a layer has to compute with: fewer than its router knows where several were
        merged into one."""
        if layer not in self.bodies:
            return self.experts_of(layer)
        return max(self.bodies[layer]) + 1


def unsupported(key: str, value: object, why: str = "") -> UnsupportedModelError:
    """The error for an option of config.json; the message names it and its value."""
    return UnsupportedModelError(
        f"`{key}` = `{value}` in config.json is not supported",
        why,
        "compare config.json with the released one, or choose another checkpoint",
    )


def _require(good: bool, key: str, value: object) -> None:
    if not good:
        raise unsupported(key, value)
