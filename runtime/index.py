"""The index of a store: what `store.json` says and `experts.safetensors` must agree with. Floor 0.

Files of a store: `config.json`, `generation_config.json`, tokenizer files and chat template as they
came; `trunk.safetensors`; `experts.safetensors`; `store.json`. A store without `store.json` is not
finished and does not open.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import FormatError, NotFoundError, UsageError
from .format import FORMAT_VERSION, PAGE_BYTES, Factors, QuantSpec, RecordLayout, record_name
from .headers import read_header

STORE_FILE = "store.json"
EXPERTS_FILE = "experts.safetensors"
TRUNK_FILE = "trunk.safetensors"


@dataclass(frozen=True, slots=True)
class ExpertRecord:
    """Where one expert record is and how to read it. `crc32c` covers (gate|up, down). `file`: 0,
    experts.safetensors; 1, the stand-ins (stand_ins.py)."""

    offset: int
    layout: RecordLayout
    crc32c: tuple[int, int]
    file: int = 0

    @property
    def num_bytes(self) -> int:
        return self.layout.num_bytes


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A trunk matrix `[rows, cols]` stored in tiles (a U8 tensor under its checkpoint name)."""

    rows: int
    cols: int
    spec: QuantSpec


@dataclass(slots=True)
class StoreIndex:
    """Everything about a store but its weights. Keys are (layer, expert)."""

    path: Path
    config: dict[str, Any]  # the checkpoint's config.json
    hidden: int
    records: dict[tuple[int, int], ExpertRecord]
    packed_trunk: dict[str, PackedTensor] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)  # how it was made, for people
    # Of a store of a pruned set, by layer: the ids that its experts have in the checkpoint (of
    # merged ones, of those that the others were merged into).
    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    # By layer whose router has other rows than there are experts: the expert that computes what
    # each row stands for, -1 where nothing does. Other layers: every row its own.
    layer_to_bodies: dict[int, tuple[int, ...]] = field(default_factory=dict)
    untrained_routers: bool = False  # the routers are random: there is nothing to run yet

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def layer_to_num_experts(self) -> dict[int, int]:
        """Number of experts of each MoE layer, in layer order; merged ones count once."""
        counts: dict[int, int] = {}
        for layer, _ in sorted(self.records):
            counts[layer] = counts.get(layer, 0) + 1
        return counts

    @property
    def layer_to_num_rows(self) -> dict[int, int]:
        """Rows of each router, in layer order: what it chooses among."""
        return {
            layer: len(self.layer_to_bodies.get(layer, range(num_experts)))
            for layer, num_experts in self.layer_to_num_experts.items()
        }

    @property
    def rows_text(self) -> str:
        """` for 24 that routers know` in a store of merged experts, else nothing."""
        num_rows = sum(self.layer_to_num_rows.values())
        return f" for {num_rows} that routers know" if self.layer_to_bodies else ""

    @property
    def is_derived(self) -> bool:
        """Whether it was made of another store by leaving out, merging or factoring experts."""
        return any((self.kept, self.layer_to_bodies, self.num_factored, self.untrained_routers))

    @property
    def num_factored(self) -> int:
        """Records whose matrices are products of smaller ones."""
        return sum(record.layout.factors is not None for record in self.records.values())

    @property
    def expert_bytes(self) -> int:
        return sum(record.num_bytes for record in self.records.values())

    @property
    def max_record_bytes(self) -> int:
        return max(record.num_bytes for record in self.records.values())


def save_index(index: StoreIndex) -> None:
    """Write `store.json`: to a temporary name, synced, then renamed."""
    specs: list[dict[str, Any]] = []

    def number(spec: QuantSpec) -> int:
        value = spec.to_json()
        if value not in specs:
            specs.append(value)
        return specs.index(value)

    layers: dict[str, dict[str, Any]] = {}
    for (layer, expert), record in sorted(index.records.items()):
        layout = record.layout
        entry = layers.setdefault(str(layer), {"width": layout.width, "experts": []})
        if len(entry["experts"]) != expert or entry["width"] != layout.width:
            raise FormatError(f"layer {layer}: experts must be numbered from 0 and of one width")
        spec_ids = [number(layout.gate_up), number(layout.down)]
        factors = layout.factors
        rest = [number(factors.spec), factors.dense, factors.rank] if factors else []
        entry["experts"].append([*spec_ids, *record.crc32c, *rest])
    for layer, bodies in index.layer_to_bodies.items():
        layers[str(layer)]["aliases"] = list(bodies)
    packed = {
        name: [tensor.rows, tensor.cols, number(tensor.spec)]
        for name, tensor in sorted(index.packed_trunk.items())
    }
    document = {
        "format": "edgemoe",
        "format_version": FORMAT_VERSION if index.num_factored else 1,
        "hidden": index.hidden,
        "specs": specs,
        "layers": layers,
        "packed_trunk": packed,
        "sha256": index.sha256,
        "plan": index.plan,
    }
    if index.kept:
        document["kept"] = {str(layer): list(ids) for layer, ids in sorted(index.kept.items())}
    if index.untrained_routers:
        document["untrained_routers"] = True
    target = index.path / STORE_FILE
    temporary = target.with_suffix(".json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def load_index(path: str | Path) -> StoreIndex:
    """Open a store's index and check it against the header of the experts' file.

    Reads no weights. Raises NotFoundError, or FormatError naming what is missing or does not agree.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotFoundError(
            f"no store at `{path}`", "expected a folder", "edgemoe convert makes one"
        )
    if not (path / STORE_FILE).is_file():
        raise NotFoundError(
            f"`{path}` is no edgemoe store",
            f"it has no `{STORE_FILE}`",
            "a Hugging Face folder becomes a store with: edgemoe convert DIR --out NAME.edgemoe",
        )
    document = _read_json(path / STORE_FILE)
    version = document.get("format_version")
    if document.get("format") != "edgemoe" or not isinstance(version, int):
        raise FormatError(f"`{path / STORE_FILE}` does not describe an edgemoe store")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"`{path}` has format version {version}",
            f"this edgemoe reads up to version {FORMAT_VERSION}",
            "install a newer edgemoe, or convert the checkpoint again",
        )
    try:
        index = _parse(path, document)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise FormatError(f"`{path / STORE_FILE}` is malformed", str(error)) from error
    except UsageError as error:  # a shape that could not have been stored
        raise FormatError(f"`{path / STORE_FILE}` is malformed", error.what) from error
    for name in (EXPERTS_FILE, TRUNK_FILE):
        if not (path / name).is_file():
            raise FormatError(f"`{path}` is incomplete", f"it has no `{name}`")
    _check_experts_file(index)
    return index


def _parse(path: Path, document: Mapping[str, Any]) -> StoreIndex:
    specs = [QuantSpec.from_json(value) for value in document["specs"]]
    hidden = int(document["hidden"])
    records: dict[tuple[int, int], ExpertRecord] = {}
    offset = 0  # counted from the start of the data; _check_experts_file adds the header
    for layer in sorted(document["layers"], key=int):
        entry = document["layers"][layer]
        for expert, (gate_up, down, crc_gate_up, crc_down, *rest) in enumerate(entry["experts"]):
            factors = Factors.of(rest, specs) if rest else None
            layout = RecordLayout(specs[gate_up], specs[down], hidden, int(entry["width"]), factors)
            crcs = int(crc_gate_up), int(crc_down)
            if min(gate_up, down, *crcs, *rest) < 0 or max(crcs) >= 1 << 32:
                raise ValueError(f"layer {layer}, expert {expert}: {crcs} are no checksums")
            records[int(layer), expert] = ExpertRecord(offset, layout, crcs)
            offset += layout.num_bytes
    aliases = {
        int(layer): _bodies(layer, entry["aliases"], len(entry["experts"]))
        for layer, entry in document["layers"].items()
        if "aliases" in entry
    }
    kept = {int(layer): tuple(map(int, ids)) for layer, ids in document.get("kept", {}).items()}
    for layer, ids in kept.items():
        if list(ids) != sorted(set(ids)) or len(ids) != len(
            document["layers"][str(layer)]["experts"]
        ):
            raise ValueError(f"layer {layer}: `kept` does not name its experts")
    packed = {
        str(name): PackedTensor(int(rows), int(cols), specs[spec])
        for name, (rows, cols, spec) in document["packed_trunk"].items()
    }
    return StoreIndex(
        path=path,
        config=_read_json(path / "config.json"),
        hidden=hidden,
        records=records,
        packed_trunk=packed,
        sha256=dict(document.get("sha256", {})),
        plan=dict(document.get("plan", {})),
        kept=kept,
        layer_to_bodies=aliases,
        untrained_routers=document.get("untrained_routers") is True,
    )


def _bodies(layer: str, values: Sequence[Any], num_experts: int) -> tuple[int, ...]:
    """The expert of every row of a router; every expert has a row."""
    if not all(type(value) is int for value in values) or set(values) - {-1} != set(
        range(num_experts)
    ):
        raise ValueError(f"layer {layer}: `aliases` do not name its {num_experts} experts")
    return tuple(values)


def _check_experts_file(index: StoreIndex) -> None:
    """Move every record's offset behind the file's header; refuse a file that disagrees."""
    name = index.path / EXPERTS_FILE
    try:
        with open(name, "rb") as file:
            tensors, _ = read_header(file, str(name))
    except OSError as error:
        raise FormatError(f"`{name}` cannot be read", str(error.strerror)) from error
    if len(tensors) != len(index.records):
        raise FormatError(
            f"`{name}` and `{STORE_FILE}` disagree",
            f"expected {len(index.records)} records, got {len(tensors)}",
        )
    start = min((entry.offset for entry in tensors.values()), default=0)
    for (layer, expert), record in index.records.items():
        entry = tensors.get(record_name(layer, expert))
        offset = start + record.offset
        if (
            entry is None
            or (entry.dtype, entry.offset, entry.num_bytes) != ("U8", offset, record.num_bytes)
            or offset % PAGE_BYTES
        ):
            raise FormatError(
                f"`{name}` and `{STORE_FILE}` disagree",
                f"record `{record_name(layer, expert)}` is not where it should be",
            )
        index.records[layer, expert] = ExpertRecord(offset, record.layout, record.crc32c)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"`{path.parent}` is incomplete", f"it has no `{path.name}`") from error
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read", str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"`{path}` does not parse", str(error)) from error
    if not isinstance(document, dict):
        raise FormatError(f"`{path}` does not hold a JSON object")
    return document
