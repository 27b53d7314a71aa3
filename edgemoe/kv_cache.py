"""The KV cache of one session: keys and values of every layer, allocated once. Floor 2."""

import numpy as np

from .models.args import ModelArgs
from .runtime import core
from .runtime.errors import UsageError
from .runtime.packing import BF16, to_bf16

_DTYPES = {32: np.float32, 16: BF16, 8: np.int8}


class KVCache:
    """Room for `capacity` tokens; `offset` tokens are stored.

    A step appends its keys and values layer by layer at `offset` and then advances once, so a step
    that fails in the middle leaves the cache as it was.

    `kv_bits` 32 is fp32, 16 is bf16, and 8 is int8 with one fp32 scale per token and head: a number
    is its int8 times the scale, max|x| / 127 of the head.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, kv_bits: int = 16
    ) -> None:
        if kv_bits not in _DTYPES:
            raise UsageError(f"`kv_bits` must be 8, 16 or 32, got {kv_bits}")
        if capacity < 1:
            raise UsageError(
                f"a context of {capacity} tokens cannot be meant", "expected 1 or more"
            )
        self.capacity, self.kv_bits = capacity, kv_bits
        self.offset = 0
        # Not zeroed: pages are first touched by the tokens that need them.
        shape = (num_layers, 2, num_kv_heads, capacity, head_dim)
        self._data = np.empty(shape, dtype=_DTYPES[kv_bits])
        self._scales = np.empty(shape[:-1], dtype=np.float32) if kv_bits == 8 else None
        # What the core is told; its position is set before every call.
        self.view = core.KvCache(
            data=self._data.ctypes.data,
            scales=None if self._scales is None else self._scales.ctypes.data,
            capacity=capacity,
            kv_bits=kv_bits,
        )

    @classmethod
    def for_model(cls, args: ModelArgs, capacity: int, kv_bits: int = 16) -> "KVCache":
        """A cache of the shape that a model (`ModelArgs`) needs."""
        return cls(args.num_layers, args.num_kv_heads, args.head_dim, capacity, kv_bits)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self._data, self._scales) if part is not None)

    def check_room(self, num_tokens: int) -> None:
        """Raise UsageError where `num_tokens` more do not fit."""
        if self.offset + num_tokens > self.capacity:
            raise UsageError(
                f"{num_tokens} more tokens do not fit into the context",
                f"{self.offset} of the {self.capacity} tokens of the context length are used",
                "raise the context length (--context), shorten the prompt, or start a new session",
            )

    def append(
        self, layer: int, keys: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Store `[T, KV, hd]` of a layer from `offset` on; returns its `[KV, capacity, hd]`s."""
        num_tokens = keys.shape[0]
        self.check_room(num_tokens)
        end = self.offset + num_tokens
        for part, new in enumerate((keys, values)):
            if self._scales is not None:
                new, scales = _to_int8(new)
                self._scales[layer, part, :, self.offset : end] = scales.T
            elif self.kv_bits == 16:
                new = to_bf16(new)
            self._data[layer, part, :, self.offset : end] = new.transpose(1, 0, 2)
        return self._data[layer, 0], self._data[layer, 1]

    def scales(self, layer: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Those of a layer's int8 keys and values, `[KV, capacity]` each; None where not needed."""
        if self._scales is None:
            return None, None
        return self._scales[layer, 0], self._scales[layer, 1]

    def advance(self, num_tokens: int) -> None:
        """Make the tokens that every layer has appended part of the context."""
        self.check_room(num_tokens)
        self.offset += num_tokens

    def trim(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self.offset:
            raise UsageError(f"cannot trim the context to {length} tokens", f"it has {self.offset}")
        self.offset = length


def _to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x `[T, KV, hd]` -> int8 of that shape, fp32 scales `[T, KV]`; as the core does it."""
    largest = np.abs(x).max(axis=-1)
    is_zero = largest < 2.0**-116  # 127 / it would overflow
    inverse = 127 / np.where(is_zero, np.float32(np.inf), largest)
    return np.rint(x * inverse[..., None]).astype(np.int8), np.where(
        is_zero, np.float32(0), largest / 127
    )
