"""Between row-major matrices and tiles or records: native where the core is there. Floor 0."""

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from . import core, reference
from .errors import EdgeMoeError, UsageError
from .format import TILE_ROWS, QuantSpec, RecordLayout

BF16 = np.dtype([("bf16", np.uint16)])  # bfloat16, which NumPy lacks, as its bits
NUMPY_DTYPES = {  # by the names of safetensors
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": BF16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
Coded = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes, scales, mins


def to_fp32(values: np.ndarray) -> np.ndarray:
    """BF16, or any type of NumPy's, as fp32; not copied where it is that."""
    if values.dtype != BF16:
        return values.astype(np.float32, copy=False)
    return (values["bf16"].astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the nearest BF16, ties to even; infinities stay, and so does what is not a number."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    rounded = np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return rounded.view(BF16)


def pack_codes(
    codes: np.ndarray,
    scales: np.ndarray,
    mins: np.ndarray | None,
    spec: QuantSpec,
    backend: str | None = None,
) -> np.ndarray:
    """codes u8 `[rows, cols]`, scales and mins fp16 `[rows, cols / G]` -> u8 `[matrix bytes]`."""
    if codes.ndim != 2 or codes.dtype != np.uint8 or spec.is_16bit:
        raise UsageError("expected u8 codes [rows, cols] and a quantized format")
    rows, cols = codes.shape
    num_bytes = _matrix_bytes(rows, cols, spec)
    if (mins is not None) != (spec.mode == "asym"):
        raise UsageError(f"mode `{spec.mode}` and mins do not go together")
    parts = [_half_words(part, (rows, cols // spec.group_size)) for part in (scales, mins)]
    if (backend or core.BACKEND) != "native":
        return reference.pack_codes(codes & ((1 << spec.bits) - 1), *parts, spec)
    codes = np.ascontiguousarray(codes)
    out = np.empty(num_bytes, dtype=np.uint8)
    status = core.lib.em_pack_codes(
        codes.ctypes.data,
        *(None if part is None else part.ctypes.data for part in parts),
        rows,
        cols,
        core.Format.of(spec),
        out.ctypes.data,
    )
    if status:
        fail("em_pack_codes", status)
    return out


def pack_16bit(words: np.ndarray, spec: QuantSpec, backend: str | None = None) -> np.ndarray:
    """bf16 or fp16 bits, u16 `[rows, cols]` -> u8 `[matrix bytes]`."""
    if words.ndim != 2 or words.dtype.itemsize != 2 or not spec.is_16bit:
        raise UsageError("expected 16-bit words [rows, cols] and a 16-bit format")
    out = np.empty(_matrix_bytes(*words.shape, spec), dtype=np.uint8)
    pack_16bit_into(np.ascontiguousarray(words).view(np.uint16), out, backend)
    return out


def unpack(
    packed: np.ndarray, rows: int, cols: int, spec: QuantSpec, backend: str | None = None
) -> np.ndarray:
    """Tiles, u8 `[matrix bytes]` -> dequantized fp32 `[rows, cols]`."""
    out = np.empty((rows, cols), dtype=np.float32)
    unpack_rows_into(packed, rows, cols, spec, 0, out, backend)
    return out


def unpack_rows_into(
    packed: np.ndarray,
    rows: int,
    cols: int,
    spec: QuantSpec,
    first: int,
    out: np.ndarray,
    backend: str | None = None,
) -> None:
    """Dequantize rows `first` .. of a packed `[rows, cols]` into out, fp32 `[n, cols]`."""
    expected = _matrix_bytes(rows, cols, spec)
    if packed.dtype != np.uint8 or packed.size != expected:
        raise UsageError(f"expected {expected} packed bytes, got {packed.size} of {packed.dtype}")
    end = first + len(out)
    if not 0 <= first <= end <= rows:
        raise UsageError(f"rows {first} .. {end - 1} are not all in 0 .. {rows - 1}")
    packed = np.ascontiguousarray(packed)
    if (backend or core.BACKEND) == "native":
        status = core.lib.em_unpack_rows(
            packed.ctypes.data, rows, cols, core.Format.of(spec), first, len(out), out.ctypes.data
        )
        if status:
            fail("em_unpack_rows", status)
        return
    tile_bytes = spec.tile_bytes(cols)
    tile, last = first // TILE_ROWS, -(-end // TILE_ROWS)
    part = packed.reshape(-1)[tile * tile_bytes : last * tile_bytes]
    top = tile * TILE_ROWS
    out[:] = reference.unpack(part, end - top, cols, spec)[first - top :]


def pack_record(
    gate: Coded | np.ndarray,
    up: Coded | np.ndarray,
    down: Coded | np.ndarray,
    layout: RecordLayout,
    backend: str | None = None,
    factors: Sequence[Coded | np.ndarray] = (),
) -> np.ndarray:
    """One expert record, u8 `[layout.num_bytes]`, paddings zero.

    Each projection is (codes, scales, mins or None), or u16 words where its section has 16 bits;
    gate, up `[F, D]`, down `[D, F]`. Of a factored record: what is stacked, and U_g, U_u, V_d.
    """
    record = np.zeros(layout.num_bytes, dtype=np.uint8)
    pairs = record[: layout.gate_up_bytes].reshape(-1, 2, layout.gate_up.tile_bytes(layout.hidden))
    for i, part in enumerate((gate, up)):
        tiles = _pack(part, (layout.inner, layout.hidden), layout.gate_up, backend)
        pairs[:, i] = tiles.reshape(len(pairs), -1)
    for part, (begin, rows, cols) in zip(factors, layout.factor_places, strict=True):
        tiles = _pack(part, (rows, cols), layout.factors.spec, backend)
        record[begin : begin + tiles.size] = tiles
    tiles = _pack(down, (layout.hidden, layout.inner), layout.down, backend)
    record[layout.down_offset : layout.down_offset + layout.down_bytes] = tiles
    return record


def unpack_record(
    record: np.ndarray, layout: RecordLayout, backend: str | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One expert record -> fp32 gate `[F, D]`, up `[F, D]`, down `[D, F]`, factors multiplied."""
    if record.dtype != np.uint8 or record.size != layout.num_bytes:
        raise UsageError(f"expected a record of {layout.num_bytes} bytes, got {record.size}")
    if (backend or core.BACKEND) != "native":
        parts = reference.unpack_parts(record, layout)
        return reference.whole_body(parts, layout)
    # A tile is 16 rows on its own, so that gate|up reads as one matrix of twice the rows.
    rows = unpack(
        record[: layout.gate_up_bytes], 2 * layout.inner, layout.hidden, layout.gate_up, backend
    ).reshape(-1, 2, TILE_ROWS, layout.hidden)
    gate, up = (rows[:, i].reshape(layout.inner, layout.hidden) for i in (0, 1))
    section = record[layout.down_offset : layout.down_offset + layout.down_bytes]
    down = unpack(section, layout.hidden, layout.inner, layout.down, backend)
    if layout.factors is None:
        return gate, up, down
    spec = layout.factors.spec
    factors = [
        unpack(record[begin : begin + spec.matrix_bytes(rows, cols)], rows, cols, spec, backend)
        for begin, rows, cols in layout.factor_places
    ]
    return reference.whole_body((gate, up, down, *factors), layout)


def pack_16bit_into(words: np.ndarray, out: np.ndarray, backend: str | None) -> None:
    """`pack_16bit` of u16 words into memory of the right size."""
    rows, cols = words.shape
    if (backend or core.BACKEND) == "native":
        status = core.lib.em_pack_16bit(words.ctypes.data, rows, cols, out.ctypes.data)
        if status:
            fail("em_pack_16bit", status)
        return
    step = TILE_ROWS * max(1, (1 << 20) // (TILE_ROWS * cols))  # bounds the transient copy
    for row in range(0, rows, step):
        block = reference.pack_16bit(words[row : row + step])
        out[row * cols * 2 : row * cols * 2 + block.size] = block


def fail(function: str, status: int) -> NoReturn:
    raise EdgeMoeError(f"`{function}` failed", f"status {status}")


def _matrix_bytes(rows: int, cols: int, spec: QuantSpec) -> int:
    spec.check_shape(rows, cols)
    return spec.matrix_bytes(rows, cols)


def _half_words(part: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray | None:
    if part is None:
        return None
    if part.shape != shape or part.dtype not in (np.float16, np.uint16):
        raise UsageError(f"expected fp16 {list(shape)}, got {part.dtype} {list(part.shape)}")
    return np.ascontiguousarray(part).view(np.uint16)


def _pack(
    part: Coded | np.ndarray, shape: tuple[int, int], spec: QuantSpec, backend: str | None
) -> np.ndarray:
    matrix = part if isinstance(part, np.ndarray) else part[0]
    if matrix.shape != shape:
        raise UsageError(f"expected a projection {list(shape)}, got {list(matrix.shape)}")
    if isinstance(part, np.ndarray):
        return pack_16bit(part, spec, backend)
    return pack_codes(*part, spec, backend)
