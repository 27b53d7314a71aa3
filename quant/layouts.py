"""Which format every tensor of a conversion gets, from headers alone. No torch."""

from dataclasses import dataclass
from math import prod

from ..runtime.errors import UsageError
from ..runtime.format import GROUP_SIZES, TILE_ROWS, QuantSpec, RecordLayout
from ..runtime.headers import DTYPE_BYTES
from .hash_tables import table_names
from .options import DEFAULT_GROUP_SIZE, ConvertOptions, ExpertSpec
from .sources import Source
from .store_source import StoreSource, WeightSource


@dataclass(frozen=True, slots=True)
class TrunkItem:
    """One tensor of the trunk: packed in tiles by `spec`, or stored as `dtype` without one.

    `is_stored`: its bytes are taken over from a store as they are.
    """

    name: str
    source: Source
    spec: QuantSpec | None
    dtype: str
    is_stored: bool = False

    @property
    def source_bytes(self) -> int:
        return self.num_bytes if self.is_stored else self.source.num_bytes

    @property
    def num_bytes(self) -> int:
        if self.spec is not None:
            rows, cols = self.source.shape
            return self.spec.matrix_bytes(rows, cols)
        return prod(self.source.shape) * DTYPE_BYTES[self.dtype]


def expert_keys(source: WeightSource) -> list[tuple[int, int]]:
    """(layer, expert) of every routed expert."""
    args = source.args
    return [(layer, e) for layer in args.moe_layers for e in range(args.num_experts)]


def _group_size(cols: int, requested: int | str | None) -> int | None:
    """The group size for a matrix of `cols` columns, or None where none fits."""
    fitting = [size for size in GROUP_SIZES if cols % size == 0]
    if requested == "channel":
        return max(fitting, default=None)
    if requested is None:
        return max((size for size in fitting if size <= DEFAULT_GROUP_SIZE), default=None)
    return requested if requested in fitting else None


def _expert_spec(
    what: str, cols: int, dtypes: frozenset[str], options: ExpertSpec, notes: list[str]
) -> QuantSpec:
    if options.bits == 16:
        mode = "fp16" if dtypes == {"F16"} else "bf16"
        rounded = sorted(dtypes - {"F16" if mode == "fp16" else "BF16"})
        if rounded:
            notes.append(f"{what} of {', '.join(rounded)} are rounded to {mode}, to nearest even")
        return QuantSpec(16, 0, mode)
    group_size = _group_size(cols, "channel" if options.per_channel else options.group_size)
    if group_size is None:
        fitting = [str(size) for size in GROUP_SIZES if cols % size == 0]
        raise UsageError(
            f"{what} cannot be quantized in groups of {options.group_size or min(GROUP_SIZES)}",
            f"they have {cols} columns, which is no multiple of it",
            f"use --group-size {' or '.join(fitting)}" if fitting else "use --bits 16",
        )
    return QuantSpec(options.bits, group_size, options.mode)


def expert_layouts(
    source: WeightSource, options: ConvertOptions, notes: list[str]
) -> dict[tuple[int, int], RecordLayout]:
    args = source.args
    made: dict[tuple[frozenset[str], str, ExpertSpec], RecordLayout] = {}
    layouts = {}
    for layer, expert in expert_keys(source):
        wide_dtypes, down_dtype = source.expert_dtypes(layer, expert)
        specs = options.specs_of(layer, expert)
        for variant, spec in enumerate(specs):
            key = (wide_dtypes, down_dtype, spec)
            if key not in made:
                found: list[str] = []
                wide = _expert_spec("expert gate|up", args.hidden, wide_dtypes, spec, found)
                down = frozenset({down_dtype})
                tall = _expert_spec("expert down", args.expert_width, down, spec.of_down, found)
                notes.extend(note for note in found if note not in notes)
                made[key] = RecordLayout(wide, tall, args.hidden, args.expert_width)
            layouts[layer, expert * len(specs) + variant] = made[key]
    first = next(iter(layouts.values()))
    if first.gate_up.group_size != first.down.group_size and not any(
        spec.down for spec in options.all_specs
    ):
        notes.append(
            f"groups of {first.gate_up.group_size} for gate|up ({args.hidden} columns) and of "
            f"{first.down.group_size} for down ({args.expert_width} columns)"
        )
    return layouts


def trunk_items(
    checkpoint: WeightSource, options: ConvertOptions, notes: list[str]
) -> list[TrunkItem]:
    if isinstance(checkpoint, StoreSource):
        if not checkpoint.is_choice:
            notes.append("the trunk is taken over from the store as it is")
        packed = {name: tensor.spec for name, tensor in checkpoint.index.packed_trunk.items()}
        return [
            TrunkItem(name, source, packed.get(name), source.dtype, is_stored=True)
            for name, source in checkpoint.trunk_entries()
        ]
    routers, tables = checkpoint.router_names(), table_names(checkpoint)
    items, odd, rounded = [], [], []
    for name, source in checkpoint.trunk.items():
        if name in tables:
            items.append(TrunkItem(name, source, None, "I32"))
            continue
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
