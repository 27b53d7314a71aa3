"""The names of tensors: the slots of the wiring, and what architectures share. No torch.

A table maps a slot of the wiring to the name in the checkpoint; `{layer}` is filled in. Where two
layouts of one architecture spell a name differently the entry is a tuple, the released one first.
Slots of a layer start with `layer.`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .args import ModelArgs

Names = Mapping[str, str | tuple[str, ...]]

EMBEDDINGS: Names = {
    "embed": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "layer.input_norm": "model.layers.{layer}.input_layernorm.weight",
    "layer.post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
}
ATTENTION: Names = {
    f"layer.{slot}": f"model.layers.{{layer}}.self_attn.{slot}_proj.weight" for slot in "qkvo"
}
ATTENTION_BIAS: Names = {
    f"layer.{slot}_bias": f"model.layers.{{layer}}.self_attn.{slot}_proj.bias" for slot in "qkvo"
}
QK_NORM: Names = {
    f"layer.{slot}_norm": f"model.layers.{{layer}}.self_attn.{slot}_norm.weight" for slot in "qk"
}
DENSE_MLP: Names = {
    f"layer.{slot}": f"model.layers.{{layer}}.mlp.{slot}_proj.weight"
    for slot in ("gate", "up", "down")
}


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of expert weights in both checkpoint layouts; `{layer}`, `{expert}` are filled in.

    One tensor per expert and projection: gate and up `[F, D]`, down `[D, F]`. Fused: one tensor per
    layer, gate|up `[E, 2F, D]` (gate rows, then up rows) and down `[E, D, F]`.
    """

    gate: str
    up: str
    down: str
    fused_gate_up: str
    fused_down: str

    def tensor(self, layer: int, expert: int, proj: str) -> str:
        """The name of one expert's `gate`, `up` or `down`."""
        names = {"gate": self.gate, "up": self.up, "down": self.down}
        return names[proj].format(layer=layer, expert=expert)

    def gate_up_of(self, layer: int) -> str:
        return self.fused_gate_up.format(layer=layer)

    def down_of(self, layer: int) -> str:
        return self.fused_down.format(layer=layer)


EXPERTS = ExpertNames(
    gate="model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    up="model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    down="model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
    fused_down="model.layers.{layer}.mlp.experts.down_proj",
)


def spellings(table: Names, slot: str, layer: int = 0) -> tuple[str, ...]:
    """The names a checkpoint may use for a slot, the released one first."""
    names = table[slot]
    return tuple(
        name.format(layer=layer) for name in ((names,) if isinstance(names, str) else names)
    )


def layer_slots(args: ModelArgs, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The trunk slots of one layer and their shapes, `[out, in]` for matrices."""
    heads, kv_heads = args.num_heads * args.head_dim, args.num_kv_heads * args.head_dim
    hidden = args.hidden
    yield "layer.input_norm", (hidden,)
    yield "layer.post_norm", (hidden,)
    for slot, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        yield f"layer.{slot}", (rows, hidden)
        if args.attention_bias:
            yield f"layer.{slot}_bias", (rows,)
    yield "layer.o", (hidden, heads)
    if args.output_bias:
        yield "layer.o_bias", (hidden,)
    if args.qk_norm != "none":
        head = args.qk_norm == "head"
        yield "layer.q_norm", (args.head_dim if head else heads,)
        yield "layer.k_norm", (args.head_dim if head else kv_heads,)
    if layer not in args.moe_layers:
        yield from _mlp("layer.", args.dense_width, hidden)
        return
    yield "layer.router", (args.experts_of(layer), hidden)
    if layer in args.hash_layers:
        yield "layer.experts_of_token", (args.vocab, args.top_k)
    if args.shared_width:
        yield from _mlp("layer.shared_", args.shared_width, hidden)
        yield "layer.shared_weight", (1, hidden)


def _mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}gate", (width, hidden)
    yield f"{prefix}up", (width, hidden)
    yield f"{prefix}down", (hidden, width)


def trunk_slots(args: ModelArgs) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Every trunk tensor as (slot, layer, shape), in the order of computation; layer -1: none."""
    yield "embed", -1, (args.vocab, args.hidden)
    for layer in range(args.num_layers):
        for slot, shape in layer_slots(args, layer):
            yield slot, layer, shape
    yield "norm", -1, (args.hidden,)
    if not args.tie_embeddings:
        yield "lm_head", -1, (args.vocab, args.hidden)


def trunk_shapes(args: ModelArgs, table: Names) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every trunk tensor a checkpoint must have, by its possible spellings."""
    return {spellings(table, slot, layer): shape for slot, layer, shape in trunk_slots(args)}


def table_names(args: ModelArgs, table: Names) -> set[str]:
    """The names of the tables of hash-routed layers: whole numbers, no weights."""
    slot = "layer.experts_of_token"
    return {name for layer in args.hash_layers for name in spellings(table, slot, layer)}
