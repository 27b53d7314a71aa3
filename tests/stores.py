"""A tiny store on disk with random weights, made with the product's own format and packing."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgemoe.runtime import kernels
from edgemoe.runtime.checksum import crc32c
from edgemoe.runtime.format import PAGE_BYTES, QuantSpec, RecordLayout, record_name
from edgemoe.runtime.headers import encode_header, read_header
from edgemoe.runtime.index import (
    EXPERTS_FILE,
    TRUNK_FILE,
    ExpertRecord,
    StoreIndex,
    load_index,
    save_index,
)

NUM_LAYERS, NUM_EXPERTS, HIDDEN = 4, 8, 64
WIDTHS = (32, 64, 96, 64)  # by layer; groups of 32 divide all of them
SPECS = (
    (QuantSpec(4, 32, "sym"), QuantSpec(4, 32, "sym")),
    (QuantSpec(2, 32, "asym"), QuantSpec(4, 32, "asym")),
    (QuantSpec(8, 32, "sym"), QuantSpec(8, 32, "sym")),
    (QuantSpec(3, 32, "sym"), QuantSpec(8, 32, "asym")),
    (QuantSpec(16, 0, "bf16"), QuantSpec(16, 0, "bf16")),
)


def random_matrix(rng: np.random.Generator, rows: int, cols: int, spec: QuantSpec):
    """Codes, scales and mins, or 16-bit words, of a random matrix with weights around 0.1."""
    if spec.is_16bit:
        weights = (rng.standard_normal((rows, cols)) * 0.1).astype(np.float32)
        return (weights.view(np.uint32) >> 16).astype(np.uint16)
    groups = cols // spec.group_size
    codes = rng.integers(0, 1 << spec.bits, (rows, cols), dtype=np.uint8)
    scales = rng.uniform(0.5, 1.0, (rows, groups)) * 0.3 / (1 << spec.bits)
    mins = None
    if spec.mode == "asym":
        mins = (-scales * (1 << spec.bits) / 2).astype(np.float16)
    return codes, scales.astype(np.float16), mins


def random_record(seed: int, layout: RecordLayout) -> np.ndarray:
    """The bytes of one expert record, u8 [num_bytes]."""
    rng = np.random.default_rng(seed)
    gate = random_matrix(rng, layout.width, layout.hidden, layout.gate_up)
    up = random_matrix(rng, layout.width, layout.hidden, layout.gate_up)
    down = random_matrix(rng, layout.hidden, layout.width, layout.down)
    return kernels.pack_record(gate, up, down, layout)


def trunk_names(path: Path) -> list[str]:
    """The tensors of a store's trunk, in the order of the file's header."""
    with open(path / TRUNK_FILE, "rb") as file:
        return list(read_header(file, TRUNK_FILE)[0])


def make_store(
    path: Path,
    *,
    num_layers: int = NUM_LAYERS,
    num_experts: int = NUM_EXPERTS,
    hidden: int = HIDDEN,
    widths: Sequence[int] = WIDTHS,
    specs: Sequence[tuple[QuantSpec, QuantSpec]] = SPECS,
    seed: int = 0,
) -> StoreIndex:
    """Write a store and load its index. Experts of a layer take turns with the `specs`, so that
    records differ in size."""
    path.mkdir(parents=True)
    layouts = {
        (layer, expert): RecordLayout(
            *specs[(layer + expert) % len(specs)], hidden, widths[layer % len(widths)]
        )
        for layer in range(num_layers)
        for expert in range(num_experts)
    }
    header = encode_header(
        [
            (record_name(*name), "U8", [layout.num_bytes], layout.num_bytes)
            for name, layout in layouts.items()
        ],
        {"format": "edgemoe"},
        PAGE_BYTES,
    )
    records = {}
    offset = len(header)
    with open(path / EXPERTS_FILE, "wb") as file:
        file.write(header)
        for number, (name, layout) in enumerate(layouts.items()):
            data = random_record(seed * 100_003 + number, layout)
            down = layout.down_offset
            crcs = crc32c(data[:down]), crc32c(data[down:])
            records[name] = ExpertRecord(offset, layout, crcs)
            offset += layout.num_bytes
            file.write(data)
    trunk = np.random.default_rng(seed).standard_normal((24, hidden)).astype(np.float16)
    trunk_header = encode_header([("embed", "F16", trunk.shape, trunk.nbytes)], {})
    (path / TRUNK_FILE).write_bytes(trunk_header + trunk.tobytes())
    config = {"model_type": "random", "hidden_size": hidden}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    sha256 = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in (EXPERTS_FILE, TRUNK_FILE)
    }
    save_index(StoreIndex(path, config, hidden, records, sha256=sha256))
    return load_index(path)


def damage_record(index: StoreIndex, layer: int, expert: int) -> None:
    """Flip one bit of a record on disk."""
    with open(index.path / EXPERTS_FILE, "r+b") as file:
        file.seek(index.records[layer, expert].offset + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
