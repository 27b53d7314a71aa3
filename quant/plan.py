"""What a conversion will do, before it does it: sizes and formats from headers alone. No torch.

A plan is printed first and then followed to the letter: `convert.py` decides nothing by itself.
"""

from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.format import PAGE_BYTES, RecordLayout, record_name
from ..runtime.headers import MAX_HEADER_BYTES, encode_header
from .bitplan import BitPlan, uniform
from .hash_tables import table_names
from .layouts import TrunkItem, expert_keys, expert_layouts, trunk_items
from .options import DEFAULT_GROUP_SIZE, ConvertOptions, ExpertSpec
from .store_source import WeightSource, open_source, source_origin
from .summary import HASH_TABLES, PlanRow, class_of, storage_text, table


@dataclass(slots=True)
class ConversionPlan:
    """Everything `convert` follows. Keys are (layer, record): the expert, or for a store of V
    variants V records for each expert, which `experts` names."""

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
    calibration: dict[str, Any] | None = None  # the texts that were calibrated on
    origin: dict[str, Any] = field(default_factory=dict)  # of a source that is a store

    @property
    def num_variants(self) -> int:
        """Records of one expert."""
        return len(self.options.variants) or 1

    def spec_of(self, layer: int, record: int) -> ExpertSpec:
        """The spec of a record."""
        expert, variant = divmod(record, self.num_variants)
        return self.options.specs_of(layer, expert)[variant]

    def bit_plan(self) -> BitPlan:
        """The spec of every expert, whether they were asked for one by one or all at once."""
        spec = self.options.spec
        name = f"uniform {spec.label}"
        return self.options.plan or uniform(name, self.layouts, spec)

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
        options = self.options
        document: dict[str, Any] = {"trunk_bits": options.trunk_bits}
        if options.variants:
            document["variants"] = [asdict(spec) for spec in options.variants]
        elif options.plan is not None:
            document["bit_plan"] = options.plan.to_json()
        else:
            document |= asdict(options.spec)
            document["group_size"] = options.group_size or DEFAULT_GROUP_SIZE
        if self.calibration is not None:
            document["calibration"] = self.calibration
        return {
            **document,
            **self.origin,
            "output_bytes": self.output_bytes,
            "bpw": round(self.bpw, 4),
            "classes": classes,
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """The plan as aligned plain text, one line per class of tensors, then the notes."""
        bit_plan = self.options.plan.lines() if self.options.plan is not None else []
        return table(self.rows) + bit_plan + [f"note: {note}" for note in self.notes]


def make_plan(
    checkpoint: WeightSource,
    options: ConvertOptions,
    calibration: dict[str, Any] | None = None,
) -> ConversionPlan:
    """Raises UsageError where the experts cannot be stored with these options."""
    notes: list[str] = []
    if options.plan is not None:
        options.plan.check_covers(expert_keys(checkpoint))
    layouts = expert_layouts(checkpoint, options, notes)
    trunk = trunk_items(checkpoint, options, notes)
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
        rows=_rows(checkpoint, layouts, trunk, len(options.variants) or 1),
        notes=notes,
        calibration=calibration,
        origin=source_origin(checkpoint),
        experts_header=experts_header,
        trunk_header=trunk_header,
        copied=copied_files(checkpoint.path),
    )


def plan_conversion(source: str | Path, options: ConvertOptions | None = None) -> ConversionPlan:
    """The plan for a checkpoint folder or a store; reads config.json and headers only."""
    with open_source(source) as opened:
        return make_plan(opened, options or ConvertOptions())


def _rows(
    checkpoint: WeightSource,
    layouts: dict[tuple[int, int], RecordLayout],
    trunk: list[TrunkItem],
    num_variants: int,
) -> list[PlanRow]:
    kinds = {spec for layout in layouts.values() for spec in (layout.gate_up, layout.down)}
    weights = sum(3 * layout.hidden * layout.width for layout in layouts.values())
    keys = expert_keys(checkpoint)
    now = sum(checkpoint.expert_bytes(*key) for key in keys) * num_variants
    store = sum(layout.num_bytes for layout in layouts.values())
    rows = [PlanRow("experts", len(layouts), weights, now, store, storage_text(kinds))]
    routers, tables = checkpoint.router_names(), table_names(checkpoint)
    classes: dict[str, list[TrunkItem]] = {}
    for item in trunk:
        label = class_of(item.name, len(item.source.shape))
        label = "routers" if item.name in routers else label
        classes.setdefault(HASH_TABLES if item.name in tables else label, []).append(item)
    for label, items in classes.items():
        weights = sum(prod(item.source.shape) for item in items)
        now = sum(item.source_bytes for item in items)
        store = sum(item.num_bytes for item in items)
        storage = storage_text(item.spec or item.dtype for item in items)
        rows.append(PlanRow(label, len(items), weights, now, store, storage))
    return sorted(rows, key=lambda row: -row.output_bytes)


_COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_COPIED += ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_COPIED += ("tokenizer.model", "chat_template.jinja", "chat_template.json")


def copied_files(path: Path) -> list[Path]:
    """What a store takes over from a checkpoint as it is, relative to the folder."""
    found = [Path(name) for name in _COPIED if (path / name).is_file()]
    more = sorted((path / "additional_chat_templates").glob("*.jinja"))
    return found + [file.relative_to(path) for file in more]
