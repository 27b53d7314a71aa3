"""What a conversion will do, before it does it: sizes and formats from headers alone. No torch.

A plan is printed first and then followed to the letter: `convert.py` decides nothing by itself.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.format import (
    DTYPE_BYTES,
    GROUP_SIZES,
    MAX_HEADER_BYTES,
    PAGE_BYTES,
    TILE_ROWS,
    QuantSpec,
    RecordLayout,
    encode_header,
    record_name,
)
from .checkpoint import Checkpoint
from .options import DEFAULT_GROUP_SIZE, ConvertOptions
from .sources import Source
from .summary import PlanRow, class_of, storage_text, table


@dataclass(frozen=True, slots=True)
class TrunkItem:
    """One tensor of the trunk: packed in tiles by `spec`, or stored as `dtype` without one."""

    name: str
    source: Source
    spec: QuantSpec | None
    dtype: str

    @property
    def num_bytes(self) -> int:
        if self.spec is not None:
            rows, cols = self.source.shape
            return self.spec.matrix_bytes(rows, cols)
        return prod(self.source.shape) * DTYPE_BYTES[self.dtype]


@dataclass(slots=True)
class ConversionPlan:
    """Everything `convert` follows. Keys are (layer, expert)."""

    options: ConvertOptions
    model_type: str
    hidden: int
    layouts: dict[tuple[int, int], RecordLayout]
    trunk: list[TrunkItem]  # in file order
    rows: list[PlanRow]
    notes: list[str]
    experts_header: bytes = field(repr=False, default=b"")
    trunk_header: bytes = field(repr=False, default=b"")
    copied: list[Path] = field(default_factory=list)  # relative to the checkpoint

    @property
    def experts_bytes(self) -> int:
        return len(self.experts_header) + sum(layout.num_bytes for layout in self.layouts.values())

    @property
    def trunk_bytes(self) -> int:
        return len(self.trunk_header) + sum(item.num_bytes for item in self.trunk)

    @property
    def source_bytes(self) -> int:
        return sum(row.source_bytes for row in self.rows)

    @property
    def output_bytes(self) -> int:
        """Bytes of both weight files."""
        return self.experts_bytes + self.trunk_bytes

    @property
    def bpw(self) -> float:
        return 8 * self.output_bytes / sum(row.num_weights for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """For `--json` and for store.json: nothing that depends on how the checkpoint was cut."""
        classes = [
            {
                "name": row.name,
                "num_tensors": row.num_tensors,
                "num_weights": row.num_weights,
                "output_bytes": row.output_bytes,
                "bpw": round(row.bpw, 4),
                "storage": row.storage,
            }
            for row in self.rows
        ]
        return {
            "bits": self.options.bits,
            "mode": self.options.mode,
            "group_size": self.options.group_size or DEFAULT_GROUP_SIZE,
            "trunk_bits": self.options.trunk_bits,
            "output_bytes": self.output_bytes,
            "bpw": round(self.bpw, 4),
            "classes": classes,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """The plan as aligned plain text, one line per class of tensors, then the notes."""
        return table(self.rows) + [f"note: {note}" for note in self.notes]


def make_plan(checkpoint: Checkpoint, options: ConvertOptions) -> ConversionPlan:
    """Raises UsageError where the experts cannot be stored with these options."""
    notes: list[str] = []
    layouts = _expert_layouts(checkpoint, options, notes)
    trunk = _trunk_items(checkpoint, options, notes)
    if checkpoint.unused:
        names = ", ".join(f"`{name}`" for name in checkpoint.unused[:3])
        more = f" and {len(checkpoint.unused) - 3} more" if len(checkpoint.unused) > 3 else ""
        notes.append(f"the model has no use for {names}{more}: left out")
    records = sorted(layouts.items())
    metadata = {"format": "edgemoe"}
    experts_header = encode_header(
        [
            (record_name(*key), "U8", [layout.num_bytes], layout.num_bytes)
            for key, layout in records
        ],
        metadata,
        PAGE_BYTES,
    )
    trunk_header = encode_header(
        [
            (
                item.name,
                "U8" if item.spec else item.dtype,
                [item.num_bytes] if item.spec else item.source.shape,
                item.num_bytes,
            )
            for item in trunk
        ],
        metadata,
        PAGE_BYTES,
    )
    if len(experts_header) > MAX_HEADER_BYTES:
        raise UsageError("this model has too many experts for one safetensors file")
    return ConversionPlan(
        options=options,
        model_type=checkpoint.args.model_type,
        hidden=checkpoint.args.hidden,
        layouts=dict(records),
        trunk=trunk,
        rows=_rows(checkpoint, layouts, trunk),
        notes=notes,
        experts_header=experts_header,
        trunk_header=trunk_header,
        copied=_copied_files(checkpoint.path),
    )


def plan_conversion(source: str | Path, options: ConvertOptions | None = None) -> ConversionPlan:
    """The plan for a checkpoint folder; reads config.json and headers only."""
    with Checkpoint(source) as checkpoint:
        return make_plan(checkpoint, options or ConvertOptions())


# ---- formats ------------------------------------------------------------------------------------


def _group_size(cols: int, requested: int | str | None) -> int | None:
    """The group size for a matrix of `cols` columns, or None where none fits."""
    fitting = [size for size in GROUP_SIZES if cols % size == 0]
    if requested == "channel":
        return max(fitting, default=None)
    if requested is None:
        return max((size for size in fitting if size <= DEFAULT_GROUP_SIZE), default=None)
    return requested if requested in fitting else None


def _expert_spec(
    what: str, cols: int, dtypes: set[str], options: ConvertOptions, notes: list[str]
) -> QuantSpec:
    if options.bits == 16:
        mode = "fp16" if dtypes == {"F16"} else "bf16"
        rounded = sorted(dtypes - {"F16" if mode == "fp16" else "BF16"})
        if rounded:
            notes.append(f"{what} of {', '.join(rounded)} are rounded to {mode}, to nearest even")
        return QuantSpec(16, 0, mode)
    group_size = _group_size(cols, options.group_size)
    if group_size is None:
        fitting = [str(size) for size in GROUP_SIZES if cols % size == 0]
        raise UsageError(
            f"{what} cannot be quantized in groups of {options.group_size or min(GROUP_SIZES)}",
            f"they have {cols} columns, which is no multiple of it",
            f"use --group-size {' or '.join(fitting)}" if fitting else "use --bits 16",
        )
    return QuantSpec(options.bits, group_size, options.mode)


def _expert_layouts(
    checkpoint: Checkpoint, options: ConvertOptions, notes: list[str]
) -> dict[tuple[int, int], RecordLayout]:
    args = checkpoint.args
    made: dict[tuple[frozenset[str], str], RecordLayout] = {}
    layouts = {}
    for layer in args.moe_layers:
        for expert in range(args.num_experts):
            gate, up, down = checkpoint.expert_sources(layer, expert)
            key = (frozenset({gate.dtype, up.dtype}), down.dtype)
            if key not in made:
                found: list[str] = []
                gate_up = _expert_spec("expert gate|up", args.hidden, set(key[0]), options, found)
                tall = _expert_spec("expert down", args.expert_width, {key[1]}, options, found)
                notes.extend(note for note in found if note not in notes)
                made[key] = RecordLayout(gate_up, tall, args.hidden, args.expert_width)
            layouts[layer, expert] = made[key]
    first = next(iter(layouts.values()))
    if first.gate_up.group_size != first.down.group_size:
        notes.append(
            f"groups of {first.gate_up.group_size} for gate|up ({args.hidden} columns) and of "
            f"{first.down.group_size} for down ({args.expert_width} columns)"
        )
    return layouts


def _trunk_items(
    checkpoint: Checkpoint, options: ConvertOptions, notes: list[str]
) -> list[TrunkItem]:
    routers = checkpoint.router_names()
    items, odd, rounded = [], [], []
    for name, source in checkpoint.trunk.items():
        matrix = len(source.shape) == 2 and source.shape[0] >= TILE_ROWS and name not in routers
        spec = None
        if matrix and options.trunk_bits < 16:
            group_size = _group_size(source.shape[1], options.group_size)
            if group_size is None:
                odd.append(name)
            else:
                spec = QuantSpec(options.trunk_bits, group_size, "sym")
        # Norms, biases and routers are small and sensitive: they keep the dtype they came in.
        dtype = "BF16" if matrix and source.dtype == "F32" else source.dtype
        if dtype != source.dtype and spec is None:
            rounded.append(name)
        items.append(TrunkItem(name, source, spec, dtype))
    if odd:
        notes.append(
            f"{len(odd)} trunk matrices stay 16 bits, their columns are no multiple of the group: "
            + ", ".join(f"`{name}`" for name in odd[:3])
            + (", ..." if len(odd) > 3 else "")
        )
    if rounded:
        notes.append(f"{len(rounded)} fp32 trunk matrices are rounded to bf16, to nearest even")
    if options.trunk_bits < 16:
        notes.append("norms, biases and routers of the trunk are stored as they came")
    # Wide dtypes first, so that every tensor is aligned to its own dtype.
    return sorted(items, key=lambda item: (_align(item), item.name))


def _align(item: TrunkItem) -> int:
    return -1 if item.spec else -DTYPE_BYTES[item.dtype]


def _rows(
    checkpoint: Checkpoint,
    layouts: dict[tuple[int, int], RecordLayout],
    trunk: list[TrunkItem],
) -> list[PlanRow]:
    sources = [source for key in layouts for source in checkpoint.expert_sources(*key)]
    kinds = {spec for layout in layouts.values() for spec in (layout.gate_up, layout.down)}
    weights = sum(prod(source.shape) for source in sources)
    now = sum(source.num_bytes for source in sources)
    store = sum(layout.num_bytes for layout in layouts.values())
    rows = [PlanRow("experts", len(layouts), weights, now, store, storage_text(kinds))]
    routers = checkpoint.router_names()
    classes: dict[str, list[TrunkItem]] = {}
    for item in trunk:
        label = class_of(item.name, len(item.source.shape))
        classes.setdefault("routers" if item.name in routers else label, []).append(item)
    for label, items in classes.items():
        weights = sum(prod(item.source.shape) for item in items)
        now = sum(item.source.num_bytes for item in items)
        store = sum(item.num_bytes for item in items)
        storage = storage_text(item.spec or item.dtype for item in items)
        rows.append(PlanRow(label, len(items), weights, now, store, storage))
    return sorted(rows, key=lambda row: -row.output_bytes)


_COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_COPIED += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_COPIED += ("tokenizer.model", "chat_template.jinja", "chat_template.json")


def _copied_files(path: Path) -> list[Path]:
    found = [Path(name) for name in _COPIED if (path / name).is_file()]
    more = sorted((path / "additional_chat_templates").glob("*.jinja"))
    return found + [file.relative_to(path) for file in more]
