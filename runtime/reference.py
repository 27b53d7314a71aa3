"""Plain NumPy twins of the native kernels: their oracle, and what runs without a core.

Written from the layout text of `format.py`. Quantized weights are dequantized to fp32 and
multiplied with fp32 activations, so results differ from the native path by its int8 activations.
Floor 0.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .format import LINE_BYTES, NF4_LEVELS, TILE_ROWS, QuantSpec, RecordLayout

LARGE_WEIGHTS = (
    4_000_000  # weights of a matrix from which on a multiplication takes noticeably long
)
_warned = False


def pack_codes(
    codes: np.ndarray, scales: np.ndarray, mins: np.ndarray | None, spec: QuantSpec
) -> np.ndarray:
    """codes u8 `[rows, cols]`, scales and mins u16 `[rows, cols / G]` (fp16 bits) -> u8 tiles."""
    rows, cols = codes.shape
    tiles = -(-rows // TILE_ROWS)
    blocks = _blocks(_pad(codes, tiles), spec.bits).reshape(tiles, cols // spec.group_size, -1)
    words = [_pad(part, tiles).transpose(0, 2, 1) for part in (scales, mins) if part is not None]
    out = np.zeros((tiles, spec.tile_bytes(cols)), dtype=np.uint8)
    for group, lines, body in _groups(spec, cols):
        for line, part in zip(lines, words, strict=True):
            out[:, line] = np.ascontiguousarray(part[:, group]).view(np.uint8)
        out[:, body] = blocks[:, group]
    return out.reshape(-1)


def pack_16bit(words: np.ndarray) -> np.ndarray:
    """words u16 `[rows, cols]` (bf16 or fp16 bits) -> u8 tiles."""
    rows, cols = words.shape
    tiles = -(-rows // TILE_ROWS)
    lanes = _pad(words, tiles).reshape(tiles, TILE_ROWS, cols // 2, 2)
    return np.ascontiguousarray(lanes.transpose(0, 2, 1, 3)).view(np.uint8).reshape(-1)


def unpack(packed: np.ndarray, rows: int, cols: int, spec: QuantSpec) -> np.ndarray:
    """u8 tiles -> fp32 `[rows, cols]`."""
    tiles = -(-rows // TILE_ROWS)
    data = packed.reshape(tiles, -1)
    if spec.is_16bit:
        lanes = np.ascontiguousarray(data).view(np.uint16).reshape(tiles, cols // 2, TILE_ROWS, 2)
        words = np.ascontiguousarray(lanes.transpose(0, 2, 1, 3)).reshape(-1, cols)[:rows]
        if spec.mode == "fp16":
            return words.view(np.float16).astype(np.float32)
        return (words.astype(np.uint32) << 16).view(np.float32)
    out = np.empty((tiles, TILE_ROWS, cols), dtype=np.float32)
    zero = 0 if spec.mode == "asym" else 1 << (spec.bits - 1)
    levels = np.array(NF4_LEVELS, dtype=np.float32)
    for group, lines, body in _groups(spec, cols):
        scale, *mins = (
            np.ascontiguousarray(data[:, line]).view(np.float16).astype(np.float32)[:, :, None]
            for line in lines
        )
        codes = _codes(data[:, body].reshape(tiles, -1, LINE_BYTES), spec.bits)
        part = scale * (levels[codes] if spec.mode == "nf4" else codes.astype(np.float32) - zero)
        columns = slice(group * spec.group_size, (group + 1) * spec.group_size)
        out[:, :, columns] = part + mins[0] if mins else part
    return out.reshape(-1, cols)[:rows]


def unpack_parts(record: np.ndarray, layout: RecordLayout) -> tuple[np.ndarray, ...]:
    """One expert record -> fp32 gate `[F, D]`, up `[F, D]`, down `[D, F]`; of a factored one what
    is stacked, and U_g, U_u `[F - S, R]`, V_d `[R, F - S]`."""
    tile_bytes = layout.gate_up.tile_bytes(layout.hidden)
    pairs = record[: layout.gate_up_bytes].reshape(-1, 2, tile_bytes)
    gate, up = (
        unpack(np.ascontiguousarray(pairs[:, i]), layout.inner, layout.hidden, layout.gate_up)
        for i in (0, 1)
    )
    section = record[layout.down_offset : layout.down_offset + layout.down_bytes]
    down = unpack(section, layout.hidden, layout.inner, layout.down)
    factors = []
    for begin, rows, cols in layout.factor_places:
        spec = layout.factors.spec
        tiles = record[begin : begin + spec.matrix_bytes(rows, cols)]
        factors.append(unpack(tiles, rows, cols, spec))
    return gate, up, down, *factors


def whole_body(
    parts: Sequence[np.ndarray], layout: RecordLayout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`unpack_parts` -> gate `[F, D]`, up `[F, D]`, down `[D, F]`: factors are multiplied."""
    gate, up, down, *factors = parts
    if layout.factors is None:
        return gate, up, down
    dense, (u_gate, u_up, v_down) = layout.factors.dense, factors
    return (
        np.concatenate([gate[:dense], u_gate @ gate[dense:]]),
        np.concatenate([up[:dense], u_up @ up[dense:]]),
        np.concatenate([down[:, :dense], down[:, dense:] @ v_down], axis=1),
    )


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x `[T, cols]`, weight `[rows, cols]` -> `[T, rows]`, all fp32."""
    global _warned
    if weight.size > LARGE_WEIGHTS and not _warned:
        _warned = True
        warnings.warn(
            "the reference kernels run, not the native core: this will be slow", stacklevel=3
        )
    y = x @ weight.T
    return y if bias is None else y + bias


def silu(x: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-x)), fp32."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, as it should
        return x / (1.0 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dimension, in the type of x."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def experts_forward(
    x: np.ndarray,
    experts: Iterable[tuple[np.ndarray, RecordLayout, np.ndarray, np.ndarray]],
    y: np.ndarray,
    observe: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> None:
    """y[t] += w * down(silu(gate x[t]) * (up x[t])) for every expert in the order given.

    x, y `[T, D]` fp32; per expert its record, layout, the tokens that chose it (one more than once
    only where pairs repeat it) and their routing weights (fp32). Holds one dequantized record at a
    time. `observe` is shown what goes into `down` [pairs, F] and what comes out of it [pairs, D].
    """
    for record, layout, tokens, weights in experts:
        gate, up, down, *factors = unpack_parts(record, layout)
        gates, ups = linear(x[tokens], gate, None), linear(x[tokens], up, None)
        if factors:
            dense, (u_gate, u_up, v_down) = layout.factors.dense, factors
            whole = silu(gates[:, :dense]) * ups[:, :dense]
            gates, ups = linear(gates[:, dense:], u_gate, None), linear(ups[:, dense:], u_up, None)
            rest = silu(gates) * ups
            h = np.concatenate([whole, rest], axis=1)
            inner = np.concatenate([whole, linear(rest, v_down, None)], axis=1)
            outputs = linear(inner, down, None)
        else:
            h = silu(gates) * ups
            outputs = linear(h, down, None)
        if observe is not None:
            observe(h, outputs)
        np.add.at(y, tokens, weights[:, None] * outputs)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, fp32."""
    mean = np.square(x).mean(axis=-1, keepdims=True, dtype=np.float32)
    return x * (1.0 / np.sqrt(mean + np.float32(eps))) * weight


def attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, window: int, scale: float
) -> np.ndarray:
    """Causal attention of q `[T, H, hd]` at `position` .. over stored `[KV, capacity, hd]`, fp32.

    The keys of the T tokens are already stored. `window` 0 sees everything. Returns `[T, H * hd]`.
    """
    num_tokens, num_heads, head_dim = q.shape
    end = position + num_tokens
    repeats = num_heads // keys.shape[0]
    k, v = (part[:, :end].repeat(repeats, axis=0) for part in (keys, values))  # [H, end, hd]
    scores = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) * np.float32(scale)  # [H, T, end]
    token = np.arange(position, end)[:, None]
    key = np.arange(end)[None, :]
    hidden = key > token
    if window > 0:
        hidden |= key <= token - window
    weights = softmax(np.where(hidden, np.float32(-np.inf), scores))
    return (weights @ v).transpose(1, 0, 2).reshape(num_tokens, num_heads * head_dim)


def _pad(matrix: np.ndarray, tiles: int) -> np.ndarray:
    """Zero rows to whole tiles; `[tiles, 16, cols]`."""
    rows, cols = matrix.shape
    missing = tiles * TILE_ROWS - rows
    return np.pad(matrix, ((0, missing), (0, 0))).reshape(tiles, TILE_ROWS, cols)


def _groups(spec: QuantSpec, cols: int) -> Iterable[tuple[int, list[slice], slice]]:
    """For each column group of a tile: where its scale (and min) and its codes lie."""
    num_lines = 2 if spec.mode == "asym" else 1
    half = LINE_BYTES // 2
    code_bytes = spec.group_size * TILE_ROWS * spec.bits // 8
    position = 0
    num_groups = cols // spec.group_size
    for first in range(0, num_groups, 2):
        body = position + num_lines * LINE_BYTES
        for i in range(min(2, num_groups - first)):
            starts = [position + line * LINE_BYTES + i * half for line in range(num_lines)]
            lines = [slice(start, start + half) for start in starts]
            yield first + i, lines, slice(body, body + code_bytes)
            body += code_bytes
        position = body


def _blocks(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes `[tiles, 16, cols]` -> code bytes `[tiles, bytes]`, all columns in order."""
    tiles, _, cols = codes.shape
    if bits == 3:
        units = codes.reshape(tiles, TILE_ROWS, cols // 32, 32)
        low = _spread(units & 3, 2)  # [tiles, units, 2, 64]
        high = _spread(units >> 2, 1)  # [tiles, units, 1, 64]
        return np.concatenate([low, high], axis=2).reshape(tiles, -1)
    return _spread(codes[:, :, None, :], bits).reshape(tiles, -1)


def _spread(codes: np.ndarray, bits: int) -> np.ndarray:
    """codes `[tiles, 16, units, n]` of `bits` each -> `[tiles, units, blocks, 64]`: column
    k + 4s + j of a block is bits `s * bits` .. of byte `row * 4 + j`."""
    tiles, _, units, n = codes.shape
    per_byte = 8 // bits
    parts = codes.reshape(tiles, TILE_ROWS, units, n // (4 * per_byte), per_byte, 4)
    shifts = (np.arange(per_byte, dtype=np.uint8) * bits)[:, None]
    words = np.bitwise_or.reduce(parts << shifts, axis=4)  # [tiles, 16, units, blocks, 4]
    return words.transpose(0, 2, 3, 1, 4).reshape(tiles, units, -1, LINE_BYTES)


def _codes(blocks: np.ndarray, bits: int) -> np.ndarray:
    """blocks `[tiles, n, 64]` -> codes u8 `[tiles, 16, cols]`."""
    tiles = blocks.shape[0]
    if bits == 3:
        units = blocks.reshape(tiles, -1, 3, LINE_BYTES)
        low = _gather(units[:, :, :2], 2)
        return low | _gather(units[:, :, 2:], 1) << 2
    return _gather(blocks[:, :, None], bits)


def _gather(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_spread`, columns joined: `[tiles, 16, cols]`."""
    tiles, units, num_blocks, _ = blocks.shape
    words = blocks.reshape(tiles, units, num_blocks, TILE_ROWS, 1, 4)
    shifts = (np.arange(8 // bits, dtype=np.uint8) * bits)[:, None]
    codes = words >> shifts & np.uint8((1 << bits) - 1)  # [tiles, units, blocks, 16, s, 4]
    return codes.transpose(0, 3, 1, 2, 4, 5).reshape(tiles, TILE_ROWS, -1)
