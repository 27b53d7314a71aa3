"""`edgemoe inspect STORE`: what a store holds. Reads headers, no weights; imports no torch."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ..runtime.amounts import format_bytes, format_count
from ..runtime.errors import EdgeMoeError
from ..runtime.format import QuantSpec
from ..runtime.headers import DTYPE_BYTES, TensorEntry, read_header
from ..runtime.index import STORE_FILE, TRUNK_FILE, ExpertRecord, StoreIndex, load_index
from . import options
from .render import open_output, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--layers", action="store_true", help="one line per layer")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    path = options.model_path(args)
    open_output()
    from ..models import load_module

    index = load_index(path or options.bundled_model())
    with open(index.path / TRUNK_FILE, "rb") as file:
        trunk, _ = read_header(file, str(index.path / TRUNK_FILE))
    model = load_module(index.model_type).parse(index.config)
    document = describe(index, trunk, model)
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        print(_text(document, args.layers))
    return 0


def spec_name(spec: QuantSpec) -> str:
    """`4-bit sym g32`, or `bf16`."""
    return spec.mode if spec.is_16bit else f"{spec.bits}-bit {spec.mode} g{spec.group_size}"


def describe(index: StoreIndex, trunk: dict[str, TensorEntry], model: Any) -> dict[str, Any]:
    """Everything `inspect` says, as one JSON object."""
    shapes = {
        name: getattr(model, name)
        for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "vocab")
        + ("max_context", "top_k")
    }
    classes = [_expert_class(index), *_trunk_classes(index, trunk)]
    weights = sum(each["weights"] for each in classes)
    num_bytes = sum(each["bytes"] for each in classes)
    return {
        "path": str(index.path),
        "model_type": index.model_type,
        "shapes": shapes,
        "hash_layers": list(model.hash_layers),
        "num_moe_layers": len(index.layer_to_num_experts),
        "num_experts": len(index.records),
        "weights": weights,
        "bytes": num_bytes,
        "bpw": 8 * num_bytes / weights,
        "classes": classes,
        "layers": _layers(index),
        "stand_ins": stand_ins_of(index),
        "files": [
            {"name": file.name, "bytes": file.stat().st_size, "sha256": index.sha256.get(file.name)}
            for file in sorted(Path(index.path).iterdir())
            if file.is_file()
        ],
        "provenance": index.plan,
    }


def stand_ins_of(index: StoreIndex) -> dict[str, Any] | None:
    """Second records at fewer bits (runtime/stand_ins.py): `bytes` of all, `record_bytes` of the
    largest, `format`; or the `error` of a file that does not go with the store. None: no file."""
    from ..models.fingerprint import checkpoint_fingerprint
    from ..runtime.stand_ins import STAND_INS_FILE, read_stand_ins

    if not (index.path / STAND_INS_FILE).is_file():
        return None
    try:
        records = read_stand_ins(index, checkpoint_fingerprint(index)).values()
    except EdgeMoeError as error:
        return {"error": str(error)}
    sizes = [record.num_bytes for record in records]
    layout = next(iter(records)).layout
    formats = dict.fromkeys([spec_name(layout.gate_up), spec_name(layout.down)])
    return {"bytes": sum(sizes), "record_bytes": max(sizes), "format": ", ".join(formats)}


def _row(name: str, formats: Counter[str], weights: int, num_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "formats": dict(formats.most_common()),  # format -> number of matrices
        "weights": weights,
        "bytes": num_bytes,
        "bpw": 8 * num_bytes / weights if weights else 0.0,
    }


def _expert_class(index: StoreIndex) -> dict[str, Any]:
    formats: Counter[str] = Counter()
    for record in index.records.values():
        formats[spec_name(record.layout.gate_up)] += 2
        formats[spec_name(record.layout.down)] += 1
        if record.layout.factors is not None:
            formats[spec_name(record.layout.factors.spec)] += 3
    weights = sum(3 * r.layout.hidden * r.layout.width for r in index.records.values())
    return _row("experts", formats, weights, index.expert_bytes)


def _trunk_classes(index: StoreIndex, trunk: dict[str, TensorEntry]) -> list[dict[str, Any]]:
    """Trunk tensors grouped by what they are for."""
    groups: dict[str, tuple[Counter[str], list[int]]] = {}
    for name, entry in trunk.items():
        formats, sums = groups.setdefault(_trunk_class(name), (Counter(), [0, 0]))
        packed = index.packed_trunk.get(name)
        formats[spec_name(packed.spec) if packed else entry.dtype.lower()] += 1
        sums[0] += packed.rows * packed.cols if packed else _num_weights(entry)
        sums[1] += entry.num_bytes
    return [_row(f"trunk: {name}", f, *sums) for name, (f, sums) in sorted(groups.items())]


def _num_weights(entry: TensorEntry) -> int:
    return entry.num_bytes // DTYPE_BYTES.get(entry.dtype, 1)


def _trunk_class(name: str) -> str:
    for part, group in (
        ("embed_tokens", "embedding"),
        ("lm_head", "output head"),
        ("self_attn", "attention"),
        ("shared_expert", "shared experts"),
        (".gate.weight", "routers"),
        (".gate.tid2eid", "experts by token id"),
        ("norm", "norms"),
        (".mlp.", "dense layers"),
    ):
        if part in name:
            return group
    return "other"


def _layers(index: StoreIndex) -> list[dict[str, Any]]:
    rows = []
    for layer, num_experts in index.layer_to_num_experts.items():
        records = [index.records[layer, expert] for expert in range(num_experts)]
        formats = Counter(
            (spec_name(r.layout.gate_up), spec_name(r.layout.down)) for r in records
        ).most_common()
        rows.append(
            {
                "layer": layer,
                "num_experts": num_experts,
                "num_rows": index.layer_to_num_rows[layer],  # of the router
                "width": records[0].layout.width,
                "factors": _factors(records),
                "formats": [[gate_up, down, count] for (gate_up, down), count in formats],
                "bytes": sum(r.num_bytes for r in records),
                "record_bytes": max(r.num_bytes for r in records),
            }
        )
    return rows


def _factors(records: list[ExpertRecord]) -> list[list[int]]:
    """[dense neurons, rank, number of experts], the most frequent first; nothing of whole ones."""
    kinds = Counter((f.dense, f.rank) for r in records if (f := r.layout.factors) is not None)
    return [[dense, rank, count] for (dense, rank), count in kinds.most_common()]


def _text(document: dict[str, Any], with_layers: bool) -> str:
    parts = [_head(document), _class_table(document["classes"])]
    if with_layers:
        parts.append(_layer_table(document["layers"]))
    parts.append(_file_table(document["files"]))
    if document["provenance"]:
        try:
            lines = _provenance(document["provenance"])
        except (EdgeMoeError, KeyError, TypeError, AttributeError, ValueError):
            lines = [f"`plan` of {STORE_FILE} is damaged; nothing else depends on it"]
        parts.append("how it was made\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _head(document: dict[str, Any]) -> str:
    shapes = document["shapes"]
    layers = document["layers"]
    largest = format_bytes(max(layer["record_bytes"] for layer in layers))
    if any(layer["bytes"] != layer["num_experts"] * layers[0]["record_bytes"] for layer in layers):
        largest = f"up to {largest}"
    counts = sorted({layer["num_experts"] for layer in document["layers"]})
    experts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    experts += " a layer"
    rows = max(layer["num_rows"] for layer in document["layers"])
    if any(layer["num_rows"] != layer["num_experts"] for layer in document["layers"]):
        experts += f" for the {rows} that routers know"
    num_moe = document["num_moe_layers"]
    with_experts = "all" if num_moe == shapes["num_layers"] else str(num_moe)
    heads = f"{shapes['num_heads']} heads of {shapes['head_dim']}"
    rows = [
        ("store", document["path"]),
        ("model", document["model_type"]),
        ("layers", f"{shapes['num_layers']}, {with_experts} with experts"),
        ("experts", f"{experts}, {shapes['top_k']} used for a token, {largest} each"),
        ("hidden", f"{shapes['hidden']}, {heads} ({shapes['num_kv_heads']} for keys and values)"),
        ("vocabulary", f"{shapes['vocab']} tokens"),
        ("context", f"up to {shapes['max_context']} tokens"),
        (
            "weights",
            f"{document['weights'] / 1e6:,.1f} M in {format_bytes(document['bytes'])} "
            f"({document['bpw']:.2f} bits a weight)",
        ),
    ]
    if hashed := document["hash_layers"]:
        named = ", ".join(map(str, hashed))
        rows.append(("hash-routed", f"layers {named}: the token id gives their experts"))
    if found := document["stand_ins"]:
        text = (
            found.get("error") or f"{format_bytes(found['record_bytes'])} each, {found['format']}"
        )
        rows.append(("stand-ins", text))
    return "\n".join(f"{name:<11} {value}" for name, value in rows)


def _class_table(classes: list[dict[str, Any]]) -> str:
    rows = []
    for each in classes:
        formats = ", ".join(f"{count} x {name}" for name, count in each["formats"].items())
        sizes = (format_count(each["weights"]), format_bytes(each["bytes"]))
        rows.append((each["name"], *sizes, f"{each['bpw']:.2f}", formats))
    return table(rows, ("part", "weights", "size", "bpw", "matrices and formats"), (0, -1))


def _layer_table(layers: list[dict[str, Any]]) -> str:
    rows = []
    for each in layers:
        formats = ", ".join(f"{n} x {a} / {b}" for a, b, n in each["formats"])
        for dense, rank, number in each["factors"]:
            formats += f"; {number} with {dense} dense neurons, the others of rank {rank}"
        sizes = (format_bytes(each["record_bytes"]), format_bytes(each["bytes"]))
        rows.append((each["layer"], each["num_experts"], each["width"], *sizes, formats))
    return table(rows, ("layer", "experts", "width", "largest", "all", "gate|up / down"), (0, -1))


def _file_table(files: list[dict[str, Any]]) -> str:
    rows = [(f["name"], format_bytes(f["bytes"]), (f["sha256"] or "")[:16]) for f in files]
    return table(rows, ("file", "size", "sha256"))


def _provenance(plan: dict[str, Any]) -> list[str]:
    lines = []
    if "set" in plan:
        lines.append(f"set         {plan['set']['name']}, by {plan['set']['method']}")
    if "merge" in plan:
        merge = plan["merge"]
        lines.append(f"merged      by {merge.get('method', 'hand')}, routers: {merge['router']}")
    if "bit_plan" in plan:
        from ..quant.bitplan import BitPlan

        lines += BitPlan.from_json(plan["bit_plan"]).lines()
    for name, value in plan.items():
        # Sizes are those of the store that it was made of, where that was a store.
        if isinstance(value, (str, int, float)) and name not in ("output_bytes", "bpw"):
            lines.append(f"{name.replace('_', ' '):<11} {value}")
    return lines + [f"note        {line}" for line in plan.get("notes", ())]
