"""Small matrices and records with their float64 oracles, for the kernel tests.

Run as a program, it prints one digest of native results per case as JSON: the tests start it under
several instruction sets and compare.
"""

import ctypes
import hashlib
import json

import numpy as np

from edgemoe.runtime import core, kernels
from edgemoe.runtime.format import NF4_LEVELS, QuantSpec, RecordLayout

QUANTIZED = [
    QuantSpec(bits, group_size, mode)
    for bits in (2, 3, 4, 8)
    for group_size in (32, 64, 128)
    for mode in ("sym", "asym")
]
QUANTIZED += [QuantSpec(4, group_size, "nf4") for group_size in (32, 64, 128)]
SIXTEEN = [QuantSpec(16, 0, "bf16"), QuantSpec(16, 0, "fp16")]


def label(spec: QuantSpec) -> str:
    return f"{spec.bits}-g{spec.group_size}-{spec.mode}"


def random_part(
    rng: np.random.Generator, rows: int, cols: int, spec: QuantSpec
) -> np.ndarray | tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What `pack_record` takes for one projection: u16 words, or (codes, scales, mins)."""
    if spec.is_16bit:
        values = (rng.normal(size=(rows, cols)) / cols**0.5).astype(np.float32)
        if spec.mode == "fp16":
            return values.astype(np.float16).view(np.uint16)
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    codes = rng.integers(0, 1 << spec.bits, (rows, cols), dtype=np.uint8)
    shape = rows, cols // spec.group_size
    scales = (rng.normal(size=shape) / (cols**0.5 * (1 << spec.bits))).astype(np.float16)
    if spec.mode != "asym":
        return codes, scales, None
    return codes, scales, (rng.normal(size=shape) / cols**0.5).astype(np.float16)


def pack(part: np.ndarray | tuple, spec: QuantSpec, backend: str | None = None) -> np.ndarray:
    if spec.is_16bit:
        return kernels.pack_16bit(part, spec, backend)
    return kernels.pack_codes(*part, spec, backend)


def weights_of(part: np.ndarray | tuple, spec: QuantSpec) -> np.ndarray:
    """The exact weights of a part, float64."""
    if spec.is_16bit:
        if spec.mode == "fp16":
            return part.view(np.float16).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return (part.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes, scales, mins = part
    scale = scales.astype(np.float64).repeat(spec.group_size, axis=1)
    if spec.mode == "nf4":
        return scale * np.array(NF4_LEVELS, dtype=np.float64)[codes]
    if mins is None:
        return scale * (codes.astype(np.float64) - (1 << (spec.bits - 1)))
    return scale * codes + mins.astype(np.float64).repeat(spec.group_size, axis=1)


def expected_tiles(part: np.ndarray | tuple, rows: int, cols: int, spec: QuantSpec) -> np.ndarray:
    """The packed bytes, one code at a time from the layout text of runtime/format.py."""
    out = np.zeros(spec.matrix_bytes(rows, cols), dtype=np.uint8)
    size = spec.tile_bytes(cols)
    for row in range(rows):
        tile, lane = out[row // 16 * size : (row // 16 + 1) * size], row % 16 * 4
        if spec.is_16bit:
            for k in range(cols):
                at = k // 2 * 64 + lane + k % 2 * 2
                tile[at : at + 2] = part[row, k : k + 1].view(np.uint8)
            continue
        codes, *lines = (item for item in part if item is not None)
        code_bytes = spec.group_size * spec.bits * 2
        start = 0
        for group in range(cols // spec.group_size):
            if group % 2 == 0:
                start = group // 2 * (64 * len(lines) + 2 * code_bytes)
            for i, words in enumerate(lines):
                at = start + 64 * i + group % 2 * 32 + row % 16 * 2
                tile[at : at + 2] = words[row, group : group + 1].view(np.uint8)
            at = start + 64 * len(lines) + group % 2 * code_bytes
            body = tile[at : at + code_bytes]
            first = group * spec.group_size
            for k, code in enumerate(codes[row, first : first + spec.group_size].tolist()):
                _place(body, lane + k % 4, k, code, spec.bits)
    return out


def _place(body: np.ndarray, lane: int, k: int, code: int, bits: int) -> None:
    if bits == 8:
        body[k // 4 * 64 + lane] = code
    elif bits == 4:
        body[k // 8 * 64 + lane] |= code << (4 if k % 8 >= 4 else 0)
    elif bits == 2:
        body[k // 16 * 64 + lane] |= code << (k % 16 // 4 * 2)
    else:
        unit = k // 32 * 192
        body[unit + k % 32 // 16 * 64 + lane] |= (code & 3) << (k % 16 // 4 * 2)
        body[unit + 128 + lane] |= (code >> 2) << (k % 32 // 4)


def quantized(x: np.ndarray) -> np.ndarray:
    """What the native path makes of fp32 activations [T, cols]: int8 per 32 columns; float64."""
    groups = x.reshape(len(x), -1, 32)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.where(largest < 2.0**-116, np.float32(0), np.float32(127) / largest)
    codes = np.rint(groups * inverse)
    scale = np.where(largest < 2.0**-116, np.float32(0), largest / np.float32(127))
    return (codes.astype(np.float64) * scale).reshape(x.shape)


def activations(x: np.ndarray, spec: QuantSpec) -> np.ndarray:
    return x.astype(np.float64) if spec.is_16bit else quantized(x)


class Expert:
    """One random expert: its record, and the exact weights."""

    def __init__(self, rng: np.random.Generator, layout: RecordLayout) -> None:
        self.layout = layout
        shapes = [(layout.inner, layout.hidden)] * 2 + [(layout.hidden, layout.inner)]
        specs = [layout.gate_up, layout.gate_up, layout.down]
        if layout.factors is not None:
            rank, rest = layout.factors.rank, layout.num_factored
            shapes += [(rest, rank)] * 2 + [(rank, rest)]
            specs += [layout.factors.spec] * 3
        parts = [random_part(rng, *s, spec) for s, spec in zip(shapes, specs, strict=True)]
        self.record = kernels.pack_record(*parts[:3], layout, factors=parts[3:])
        weights = [weights_of(part, spec) for part, spec in zip(parts, specs, strict=True)]
        self.gate, self.up, self.down, *self.factors = weights

    def forward(self, x: np.ndarray) -> np.ndarray:
        """x fp32 [T, D] -> float64 [T, D], with the activations the native path sees."""
        a = activations(x, self.layout.gate_up)
        gate, up = a @ self.gate.T, a @ self.up.T
        if not self.factors:
            return activations(_gated(gate, up), self.layout.down) @ self.down.T
        dense, spec = self.layout.factors.dense, self.layout.factors.spec
        p, q = (activations(part[:, dense:].astype(np.float32), spec) for part in (gate, up))
        h = _gated(p @ self.factors[0].T, q @ self.factors[1].T)
        reduced = (activations(h, spec) @ self.factors[2].T).astype(np.float32)
        inner = np.concatenate([_gated(gate[:, :dense], up[:, :dense]), reduced], axis=1)
        return activations(inner, self.layout.down) @ self.down.T


def _gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return (gate / (1 + np.exp(-gate)) * up).astype(np.float32)


def run_moe(
    experts: list[Expert],
    pairs: list[list[tuple[int, float]]],
    x: np.ndarray,
    pool: kernels.ThreadPool | None = None,
    store: int | None = None,
    addresses: np.ndarray | None = None,
    **outputs: np.ndarray,
) -> tuple[np.ndarray, int, core.MoeArgs]:
    """em_moe_run with (token, weight) pairs per expert; (y, status, args)."""
    num = len(experts)
    begin = np.cumsum([0] + [len(part) for part in pairs], dtype=np.int64)
    token = np.array([t for part in pairs for t, _ in part], dtype=np.int32)
    weight = np.array([w for part in pairs for _, w in part], dtype=np.float32)
    keys = np.arange(num, dtype=np.int32)
    copies = [aligned(expert.record) for expert in experts]
    data = np.array([copy.ctypes.data for copy in copies], dtype=np.uint64)
    if addresses is not None:
        data = addresses
    records = (core.Record * num)()
    for record, expert in zip(records, experts, strict=True):
        record.describe(expert.layout)
    hidden, width = experts[0].layout.hidden, experts[0].layout.width
    row_floats = max(expert.layout.row_floats for expert in experts)
    floats = core.lib.em_moe_workspace_floats(len(x), len(token), hidden, row_floats)
    guard = 64
    workspace = np.full(floats + guard, 7.0, dtype=np.float32)
    x = np.ascontiguousarray(x)
    y = np.zeros((len(x), hidden), dtype=np.float32)
    args = core.MoeArgs(num_tokens=len(x), hidden=hidden, width=width, num_experts=num)
    arrays = {"x": x, "y": y, "keys": keys, "data": data, "workspace": workspace}
    arrays |= {"pair_begin": begin, "pair_token": token, "pair_weight": weight} | outputs
    for name, array in arrays.items():
        setattr(args, name, array.ctypes.data)
    handle = pool.handle if pool else None
    status = core.lib.em_moe_run(handle, store, None if store else records, ctypes.byref(args))
    assert (workspace[floats:] == 7.0).all(), "wrote behind the workspace"
    return y, status, args


def aligned(data: np.ndarray) -> np.ndarray:
    room = np.empty(data.size + 4096, dtype=np.uint8)
    start = -room.ctypes.data % 4096
    copy = room[start : start + data.size]
    copy[:] = data
    return copy


def mixed_experts(rng: np.random.Generator, hidden: int = 128, width: int = 128) -> list[Expert]:
    specs = [QUANTIZED[i] for i in (0, 9, 14, 23)] + SIXTEEN
    others = specs[2:] + specs[:2]
    layouts = [RecordLayout(a, b, hidden, width) for a, b in zip(specs, others, strict=True)]
    return [Expert(rng, layout) for layout in layouts]


def mixed_pairs(rng: np.random.Generator, experts: int, tokens: int) -> list[list]:
    chosen = [np.flatnonzero(rng.random(tokens) < 0.6).tolist() for _ in range(experts)]
    return [[(t, float(rng.random())) for t in part] for part in chosen]


def digests() -> dict[str, str]:
    rng = np.random.default_rng(5)
    results: dict[str, str] = {}
    with kernels.ThreadPool(2) as pool:
        for spec in QUANTIZED + SIXTEEN:
            rows, cols = 40, 3 * (spec.group_size or 30)
            part = random_part(rng, rows, cols, spec)
            matrix = kernels.PackedMatrix(pack(part, spec), rows, cols, spec)
            x = rng.normal(size=(15, cols)).astype(np.float32)
            x[3], x[4] = 0, x[4] * 1e30
            x[5, 1], x[6, 2] = np.nan, np.inf
            y = matrix.linear(x, None, pool)
            y[np.isnan(y)] = 0  # which NaN comes out is not part of the promise
            results[label(spec)] = hashlib.sha256(y.tobytes()).hexdigest()
        experts = mixed_experts(rng)
        x = rng.normal(size=(11, 128)).astype(np.float32) * 3
        y, status, _ = run_moe(experts, mixed_pairs(rng, len(experts), 11), x, pool)
        results["moe"] = f"{status} {hashlib.sha256(y.tobytes()).hexdigest()}"
    return results


if __name__ == "__main__":
    print(json.dumps({"isa": core.lib.em_isa().decode(), "digests": digests()}))
