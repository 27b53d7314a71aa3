"""The Python face of the compute kernels: native where the core is there, else the twins of
`reference.py`. Shape letters: T tokens, D hidden, F expert width. Floor 0.
"""

import numpy as np

from . import core, reference
from .checksum import crc32c
from .errors import EdgeMoeError, UsageError
from .format import LINE_BYTES, QuantSpec
from .memory import Pile, aligned_memory
from .packing import (
    BF16,
    fail,
    pack_16bit,
    pack_16bit_into,
    pack_codes,
    pack_record,
    to_fp32,
    unpack,
    unpack_record,
    unpack_rows_into,
)

__all__ = [
    "BF16",
    "PackedMatrix",
    "ThreadPool",
    "attention",
    "crc32c",
    "default_backend",
    "pack_16bit",
    "pack_codes",
    "pack_record",
    "rms_norm",
    "unpack",
    "unpack_record",
]


def default_backend() -> str:
    """`native` where the core was loaded, else `reference`."""
    return core.BACKEND


class ThreadPool:
    """The core's threads, the caller included; one call at a time. Nothing without the core."""

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise UsageError(f"expected at least 1 thread, got {num_threads}")
        self.num_threads = num_threads
        self.handle: int | None = core.lib.em_pool_create(num_threads) if core.lib else None
        if core.lib and not self.handle:
            raise EdgeMoeError(
                f"could not start {num_threads} threads",
                "the system refused them",
                "ask for fewer threads",
            )

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle:
            core.lib.em_pool_destroy(handle)

    def __enter__(self) -> "ThreadPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PackedMatrix:
    """A resident matrix `[rows, cols]` in tiles: a linear layer or an embedding.

    `data` u8 `[num_bytes]`, 64-byte aligned.
    """

    def __init__(
        self, data: np.ndarray, rows: int, cols: int, spec: QuantSpec, backend: str | None = None
    ) -> None:
        expected = spec.matrix_bytes(rows, cols)
        if data.dtype != np.uint8 or data.size != expected:
            raise UsageError(
                f"a packed matrix of {rows} x {cols} takes {expected} bytes of u8, "
                f"got {data.size} of {data.dtype}"
            )
        data = np.ascontiguousarray(data)
        if data.ctypes.data % LINE_BYTES:  # a line split over two cache lines costs twice
            unaligned, data = data, aligned_memory(expected)
            data[:] = unaligned
        self.data = data
        self.rows, self.cols, self.spec = rows, cols, spec
        self._backend = backend or core.BACKEND
        self._format = core.Format.of(spec)

    @property
    def num_bytes(self) -> int:
        return self.data.size

    @classmethod
    def from_16bit(
        cls, weight: np.ndarray, backend: str | None = None, pile: Pile | None = None
    ) -> "PackedMatrix":
        """Pack a BF16 or fp16 weight `[rows, cols]`, into the pile where one is given.

        Its bits are kept.
        """
        modes = {BF16: "bf16", np.dtype(np.float16): "fp16"}
        if weight.dtype not in modes or weight.ndim != 2:
            raise UsageError(
                f"expected a bf16 or fp16 matrix, got {weight.dtype} of shape {list(weight.shape)}"
            )
        spec = QuantSpec(16, 0, modes[weight.dtype])
        rows, cols = weight.shape
        spec.check_shape(rows, cols)
        words = np.ascontiguousarray(weight).view(np.uint16)
        num_bytes = spec.matrix_bytes(rows, cols)
        data = pile.take(num_bytes) if pile else aligned_memory(num_bytes)
        pack_16bit_into(words, data, backend)
        return cls(data, rows, cols, spec, backend)

    @classmethod
    def from_packed(
        cls, data: np.ndarray, rows: int, cols: int, spec: QuantSpec, backend: str | None = None
    ) -> "PackedMatrix":
        """Tiles as they lie in a store, u8 `[num_bytes]`; not copied where aligned."""
        return cls(data, rows, cols, spec, backend)

    def linear(
        self, x: np.ndarray, bias: np.ndarray | None = None, pool: ThreadPool | None = None
    ) -> np.ndarray:
        """x `[T, cols]` fp32 -> x . W^T + bias, `[T, rows]` fp32.

        Native: a row of the result depends on neither T nor the threads, bit for bit; quantized
        weights take x as int8 in groups of 32 columns.
        """
        if x.ndim != 2 or x.shape[1] != self.cols or x.dtype != np.float32:
            raise UsageError(
                f"expected fp32 activations [T, {self.cols}], got {x.dtype} {list(x.shape)}"
            )
        if bias is not None:
            if bias.shape != (self.rows,):
                raise UsageError(f"expected a bias [{self.rows}], got {list(bias.shape)}")
            bias = np.ascontiguousarray(bias, dtype=np.float32)
        if self._backend != "native":
            return reference.linear(x, self.dequantize(), bias)
        x = np.ascontiguousarray(x)
        y = np.empty((x.shape[0], self.rows), dtype=np.float32)
        status = core.lib.em_linear(
            pool.handle if pool is not None else None,
            self.data.ctypes.data,
            self.rows,
            self.cols,
            self._format,
            x.ctypes.data,
            x.shape[0],
            None if bias is None else bias.ctypes.data,
            y.ctypes.data,
        )
        if status:
            fail("em_linear", status)
        return y

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        """Rows `ids` `[T]` as fp32 `[T, cols]`: an embedding lookup."""
        out = np.empty((ids.size, self.cols), dtype=np.float32)
        for i, row in enumerate(ids.reshape(-1).tolist()):
            self._unpack(row, out[i : i + 1])
        return out

    def dequantize(self) -> np.ndarray:
        """The whole matrix, fp32 `[rows, cols]`."""
        out = np.empty((self.rows, self.cols), dtype=np.float32)
        self._unpack(0, out)
        return out

    def _unpack(self, first: int, out: np.ndarray) -> None:
        rows, cols = self.rows, self.cols
        unpack_rows_into(self.data, rows, cols, self.spec, first, out, self._backend)


def rms_norm(
    x: np.ndarray, weight: np.ndarray, eps: float, backend: str | None = None
) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; x `[..., cols]` fp32."""
    if x.dtype != np.float32 or weight.shape != x.shape[-1:]:
        raise UsageError(
            f"rms_norm: expected fp32 [..., {weight.size}], got {x.dtype} {list(x.shape)}"
        )
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    if (backend or core.BACKEND) != "native":
        return reference.rms_norm(x, weight, eps)
    x = np.ascontiguousarray(x)
    y = np.empty_like(x)
    cols = x.shape[-1]
    core.lib.em_rms_norm(
        x.ctypes.data, weight.ctypes.data, x.size // cols, cols, eps, y.ctypes.data
    )
    return y


def attention(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    window: int,
    scale: float,
    pool: ThreadPool | None = None,
    backend: str | None = None,
    key_scales: np.ndarray | None = None,
    value_scales: np.ndarray | None = None,
) -> np.ndarray:
    """Causal attention of q `[T, H, hd]` fp32 at `position` .. `position + T - 1`.

    keys, values `[KV, capacity, hd]` (fp32, BF16, or int8 with fp32 scales `[KV, capacity]`)
    already hold the T tokens; token p sees keys p - window + 1 .. p (all where `window` is 0).
    Returns `[T, H * hd]` fp32.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, capacity, _ = keys.shape
    bits = {np.dtype(np.float32): 32, BF16: 16, np.dtype(np.int8): 8}.get(keys.dtype)
    scales = [part for part in (key_scales, value_scales) if part is not None]
    if (
        q.dtype != np.float32
        or bits is None
        or values.dtype != keys.dtype
        or values.shape != keys.shape
        or keys.shape[2] != head_dim
        or num_heads % num_kv_heads
        or [part.shape for part in scales] != [keys.shape[:2]] * (2 if bits == 8 else 0)
        or not 0 <= position <= capacity - num_tokens
    ):
        raise UsageError(
            f"attention: q {list(q.shape)} at {position} does not go with keys of {keys.dtype} "
            f"{list(keys.shape)} and values of {values.dtype} {list(values.shape)}"
        )
    if (backend or core.BACKEND) != "native":
        keys, values = to_fp32(keys), to_fp32(values)
        if scales:
            keys, values = keys * key_scales[..., None], values * value_scales[..., None]
        return reference.attention(q, keys, values, position, window, scale)
    q, keys, values = map(np.ascontiguousarray, (q, keys, values))
    scales = [np.ascontiguousarray(part) for part in scales]
    out = np.empty((num_tokens, num_heads * head_dim), dtype=np.float32)
    status = core.lib.em_attention(
        pool.handle if pool is not None else None,
        q.ctypes.data,
        keys.ctypes.data,
        values.ctypes.data,
        *([part.ctypes.data for part in scales] or (None, None)),
        bits,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        capacity,
        position,
        window,
        scale,
        out.ctypes.data,
    )
    if status:
        fail("em_attention", status)
    return out
