"""The layout of a store, byte by byte. The only place that knows it. Floor 0.

A store is a folder `NAME.edgemoe/` (files: see `index.py`). This module describes what is inside
its two safetensors files.

Tile. A weight matrix `[rows, cols]` (y = W x) is stored as ceil(rows / 16) tiles, each 16 output
rows x all columns, strictly linear, so that a matrix-vector product reads one ascending stream.
The last tile is padded with zero rows. A 32-bit lane belongs to one row, so that 16 lanes of one
64-byte line are the 16 rows of the tile and no instruction set needs a repack or a horizontal sum.

Quantized tile (2, 3, 4, 8 bits; groups of G = 32, 64 or 128 columns). For each pair of column
groups g, g+1:

- 64 B   fp16 scale[g][16 rows], fp16 scale[g+1][16 rows]
- 64 B   fp16 min[g][16], fp16 min[g+1][16]: asymmetric only
- codes of g, then codes of g+1. With an odd number of groups the last pair has a half-used scale
  line (the rest is zero) and the codes of one group.

One 64-byte code block holds, at byte `row * 4 + j` (j = 0..3; k = first column of the block):

- 8 bit, 4 columns: the code of column k + j
- 4 bit, 8 columns: low nibble column k + j, high nibble column k + 4 + j
- 2 bit, 16 columns: bits 2s, 2s+1 = column k + 4s + j, s = 0..3
- 3 bit, 32 columns in 192 B: two 2-bit blocks with the low two bits (columns k.. and k + 16..),
  then one block whose bit s is the high bit of column k + 4s + j, s = 0..7

Codes are unsigned. Symmetric: w = scale * (code - 2^(bits-1)). Asymmetric: w = scale * code + min.
NF4: 4-bit codes in the same places, w = scale * NF4_LEVELS[code], no min. The levels are the 16
values of NormalFloat4 (Dettmers et al., QLoRA, 2023) in 127ths, rounded: integers, so that they
meet int8 activations in the same dot products, and this table is the definition.
A scale per channel is a group scale repeated along the row: one kernel serves both.

16-bit tile (bf16 or fp16): one 64-byte block holds two columns; the lane of a row has column k in
its low half and k + 1 in its high half. Columns are even.

Expert record: gate|up section, then down section, each padded with zeros to 4096 bytes so that each
can be one direct read. gate|up: for every tile t, the gate tile t, then the up tile t (rows =
expert width, cols = hidden). down: its tiles in order (rows = hidden, cols = expert width). No
header: the index holds offsets, formats and the crc32c of each section (padding included).

Factored record (MC-SMoE, 2310.01334): of the F neurons the first S are `dense` and are stored as
above; the weights of the others are products of rank R, gate = U_g V_g, up = U_u V_u, down =
U_d V_d. Dense rows and first factors lie stacked, so that gate|up and down are those of an expert
of width S + R:

- gate|up section: tiles of [dense gate; V_g] and [dense up; V_u], each `[S + R, D]`; then, in the
  format `factors`, the tiles of U_g and of U_u, each `[F - S, R]`, and of V_d `[R, F - S]`
- down section: [dense down, U_d], `[D, S + R]`

With p = V_g x, q = V_u x and h = silu(U_g p) * (U_u q): y = [dense down, U_d] [dense h; V_d h]. In
any order neurons compute the same, so the dense ones need no index.

experts.safetensors: a valid safetensors file. The JSON header is padded with spaces so that the
data starts on a 4096-byte boundary; one U8 tensor per record, `layers.{layer}.experts.{expert}`, in
(layer, expert) order without gaps. Both follow from safetensors itself (no holes) and from direct
I/O (offset, length and memory on 4096).

Restrictions and their reasons: columns are a multiple of G, since a group never spans two rows;
hidden and expert width are multiples of 16, since a tile never mixes gate and up; S, R and F - S of
a factored record are multiples of 32, since activations have a scale for every 32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import FormatError, UsageError

FORMAT_VERSION = 2  # 1 is written where no record is factored, which is all that 2 adds
PAGE_BYTES = 4096
TILE_ROWS = 16
LINE_BYTES = 64
ACT_GROUP = 32  # columns that share one int8 activation scale
BITS = (2, 3, 4, 8, 16)
GROUP_SIZES = (32, 64, 128)
MODES = ("sym", "asym", "bf16", "fp16", "nf4")  # the order is the core's EM_MODE_* numbering
NF4_LEVELS = (-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127)


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one matrix is stored. `group_size` is 0 for the 16-bit modes."""

    bits: int
    group_size: int
    mode: str

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.mode not in MODES:
            raise FormatError(f"unknown quantization `{self.bits}` bits, mode `{self.mode}`")
        if (self.bits == 16) != (self.mode in ("bf16", "fp16")):
            raise FormatError(f"mode `{self.mode}` does not go with {self.bits} bits")
        if self.mode == "nf4" and self.bits != 4:
            raise FormatError(f"mode `nf4` has 4 bits, got {self.bits}")
        if self.group_size not in ((0,) if self.bits == 16 else GROUP_SIZES):
            raise FormatError(f"unknown group size `{self.group_size}` at {self.bits} bits")

    @property
    def is_16bit(self) -> bool:
        return self.bits == 16

    def check_shape(self, rows: int, cols: int) -> None:
        """Raise `UsageError` where a matrix of this shape cannot be stored with this spec."""
        unit = 2 if self.is_16bit else self.group_size
        if rows < 1 or cols < 1 or cols % unit:
            raise UsageError(
                f"a matrix of {rows} x {cols} cannot be stored with groups of {unit}",
                f"{cols} columns are not a multiple of {unit}",
                "choose a smaller --group-size",
            )

    def tile_bytes(self, cols: int) -> int:
        """Bytes of one 16-row tile of `cols` columns."""
        if self.is_16bit:
            return cols * TILE_ROWS * 2
        groups = cols // self.group_size
        lines_per_pair = 2 if self.mode == "asym" else 1
        return -(-groups // 2) * LINE_BYTES * lines_per_pair + cols * TILE_ROWS * self.bits // 8

    def matrix_bytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed matrix `[rows, cols]`, the padded last tile included."""
        return -(-rows // TILE_ROWS) * self.tile_bytes(cols)

    def to_json(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size, "mode": self.mode}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "QuantSpec":
        try:
            return cls(int(value["bits"]), int(value["group_size"]), str(value["mode"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"malformed quantization spec `{value!r}`") from error


@dataclass(frozen=True, slots=True)
class Factors:
    """What is factored in a record: all neurons behind the first `dense`, by products of `rank`.
    `spec`: the format of U_g, U_u and V_d."""

    dense: int
    rank: int
    spec: QuantSpec

    @classmethod
    def of(cls, values: Sequence[Any], specs: Sequence[QuantSpec]) -> "Factors":
        """From the numbers of store.json: which spec, `dense` and `rank`."""
        spec, dense, rank = map(int, values)
        return cls(dense, rank, specs[spec])


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Sizes and offsets inside one expert record, in bytes. `width`: neurons, factored or not."""

    gate_up: QuantSpec
    down: QuantSpec
    hidden: int
    width: int
    factors: Factors | None = None

    def __post_init__(self) -> None:
        if self.hidden % TILE_ROWS or self.width % TILE_ROWS:
            raise UsageError(
                f"hidden size {self.hidden} and expert width {self.width} must be multiples of "
                f"{TILE_ROWS}"
            )
        if self.factors is not None:
            dense, rank, factored = self.factors.dense, self.factors.rank, self.num_factored
            if min(dense, rank - 1, factored - 1) < 0 or (dense | rank | factored) % ACT_GROUP:
                raise UsageError(
                    f"{dense} dense neurons of {self.width} and rank {rank} cannot be stored",
                    f"both, and what is factored, are multiples of {ACT_GROUP}",
                )
            self.factors.spec.check_shape(factored, rank)
            self.factors.spec.check_shape(rank, factored)
        self.gate_up.check_shape(self.inner, self.hidden)
        self.down.check_shape(self.hidden, self.inner)

    @property
    def num_factored(self) -> int:
        """Neurons whose weights are products."""
        return 0 if self.factors is None else self.width - self.factors.dense

    @property
    def inner(self) -> int:
        """Rows of gate and of up as stored, columns of down: the width, or S + R."""
        return self.width if self.factors is None else self.factors.dense + self.factors.rank

    @property
    def row_floats(self) -> int:
        """fp32 values that computing one token takes between gate|up and down."""
        return self.width + (0 if self.factors is None else 3 * self.factors.rank)

    @property
    def gate_up_bytes(self) -> int:
        return 2 * self.gate_up.matrix_bytes(self.inner, self.hidden)

    @property
    def factor_places(self) -> tuple[tuple[int, int, int], ...]:
        """Where U_g, U_u and V_d begin in the record, and their rows and columns."""
        places, begin = [], self.gate_up_bytes
        if self.factors is not None:
            shape = self.num_factored, self.factors.rank
            for rows, cols in (shape, shape, shape[::-1]):
                places.append((begin, rows, cols))
                begin += self.factors.spec.matrix_bytes(rows, cols)
        return tuple(places)

    @property
    def down_offset(self) -> int:
        end = self.gate_up_bytes
        if self.factors is not None:
            begin, rows, cols = self.factor_places[-1]
            end = begin + self.factors.spec.matrix_bytes(rows, cols)
        return round_up(end, PAGE_BYTES)

    @property
    def down_bytes(self) -> int:
        return self.down.matrix_bytes(self.hidden, self.inner)

    @property
    def num_bytes(self) -> int:
        return self.down_offset + round_up(self.down_bytes, PAGE_BYTES)


def record_name(layer: int, expert: int) -> str:
    """The tensor name of an expert record."""
    return f"layers.{layer}.experts.{expert}"
