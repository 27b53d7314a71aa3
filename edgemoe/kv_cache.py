"""The KV cache of one session: keys and values of every layer in memory of its own. Floor 2."""

import ctypes
from collections.abc import Iterator

import numpy as np

from .models.args import ModelArgs
from .runtime import core
from .runtime.errors import UsageError
from .runtime.format import round_up
from .runtime.memory import HUGE_PAGE_BYTES, Arena
from .runtime.packing import BF16, to_bf16

_DTYPES = {32: np.dtype(np.float32), 16: BF16, 8: np.dtype(np.int8)}
_SCALE_BYTES = 4
_STEP_TOKENS = 256  # a larger room comes in such steps


class KVCache:
    """A context of `capacity` tokens; `offset` tokens are stored.

    A step appends its keys and values layer by layer at `offset` and then advances once, so a step
    that fails in the middle leaves the cache as it was.

    `kv_bits` 32 is fp32, 16 is bf16, and 8 is int8 with one fp32 scale per token and head: a number
    is its int8 times the scale, max|x| / 127 of the head.

    Its bytes lie as [layer, key or value, head, room, head_dim], then the scales. `room`, at first
    `capacity`, is for how many tokens they are laid out (`resize`): a small one leaves the rest of
    the memory alone, which a layout for all tokens would touch with the first.
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
        self._heads, self._head_dim = (num_layers, 2, num_kv_heads), head_dim
        self._num_rows = 2 * num_layers * num_kv_heads
        self._row_bytes = head_dim * _DTYPES[kv_bits].itemsize  # of one token and head
        self._scale_bytes = _SCALE_BYTES if kv_bits == 8 else 0
        # Not zeroed: pages are first touched by the tokens that need them.
        self._arena = Arena(self.num_bytes)
        self._lay_out(capacity)

    @classmethod
    def for_model(cls, args: ModelArgs, capacity: int, kv_bits: int = 16) -> "KVCache":
        """A cache of the shape that a model (`ModelArgs`) needs."""
        return cls(args.num_layers, args.num_kv_heads, args.head_dim, capacity, kv_bits)

    @property
    def num_bytes(self) -> int:
        return self.capacity * self._token_bytes

    def held_bytes(self, room: int) -> int:
        """Of memory that is touched where so many tokens have room, at most."""
        return min(self.num_bytes, round_up(room * self._token_bytes, HUGE_PAGE_BYTES))

    def room_for(self, num_tokens: int) -> int:
        """The room to take for so many tokens: some are to come, and each step moves all rows."""
        wanted = min(self.capacity, round_up(num_tokens + num_tokens // 8, _STEP_TOKENS))
        return min(self.capacity, self.held_bytes(wanted) // self._token_bytes)

    def make_room(self, num_tokens: int) -> None:
        """Have room for so many tokens or more, as far as the context goes."""
        if num_tokens > self.room < self.capacity:
            self.resize(self.room_for(num_tokens))

    def resize(self, room: int) -> None:
        """Lay out `room` tokens, those stored among them, and give memory behind them back."""
        if not max(1, self.offset) <= room <= self.capacity:
            raise UsageError(
                f"a room for {room} tokens cannot be",
                f"expected {max(1, self.offset)} to {self.capacity}",
            )
        old, start = self.room, self._arena.address
        moves = list(zip(self._rows(room), self._rows(old), strict=True))
        for (target, num_bytes), (source, _) in reversed(moves) if room > old else moves:
            ctypes.memmove(start + target, start + source, self.offset * num_bytes)
        self._lay_out(room)
        if room < old:
            held_bytes = self.held_bytes(room)
            self._arena.discard(held_bytes, self.num_bytes - held_bytes)

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
        """Store `[T, KV, hd]` of a layer from `offset` on; returns its `[KV, room, hd]`s."""
        num_tokens = keys.shape[0]
        self.check_room(num_tokens)
        end = self.offset + num_tokens
        if end > self.room:
            raise UsageError(f"{end} tokens have no room", f"the KV cache has {self.room}")
        for part, new in enumerate((keys, values)):
            if self._scales is not None:
                new, scales = _to_int8(new)
                self._scales[layer, part, :, self.offset : end] = scales.T
            elif self.kv_bits == 16:
                new = to_bf16(new)
            self._data[layer, part, :, self.offset : end] = new.transpose(1, 0, 2)
        return self._data[layer, 0], self._data[layer, 1]

    def scales(self, layer: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Those of a layer's int8 keys and values, `[KV, room]` each; None where not needed."""
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

    @property
    def _token_bytes(self) -> int:
        return self._num_rows * (self._row_bytes + self._scale_bytes)

    def _rows(self, room: int) -> Iterator[tuple[int, int]]:
        """Where the heads lie, then their scales, ascending: (offset, bytes of a token)."""
        begin = 0
        for num_bytes in (self._row_bytes, self._scale_bytes):
            for _ in range(self._num_rows if num_bytes else 0):
                yield begin, num_bytes
                begin += room * num_bytes

    def _lay_out(self, room: int) -> None:
        data_bytes = self._num_rows * room * self._row_bytes
        shape, dtype = (*self._heads, room), _DTYPES[self.kv_bits]
        data = self._arena.view(0, data_bytes).view(dtype)
        self._data, self._scales = data.reshape(*shape, self._head_dim), None
        # What the core is told, another whenever it changes; its position is set before every call.
        self.view = core.KvCache(data=self._arena.address, capacity=room, kv_bits=self.kv_bits)
        if self._scale_bytes:
            scale_bytes = self._num_rows * room * self._scale_bytes
            scales = self._arena.view(data_bytes, scale_bytes).view(np.float32)
            self._scales = scales.reshape(shape)
            self.view.scales = self._scales.ctypes.data
        self.room = room


def _to_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x `[T, KV, hd]` -> int8 of that shape, fp32 scales `[T, KV]`; as the core does it."""
    largest = np.abs(x).max(axis=-1)
    is_zero = largest < 2.0**-116  # 127 / it would overflow
    inverse = 127 / np.where(is_zero, np.float32(np.inf), largest)
    return np.rint(x * inverse[..., None]).astype(np.int8), np.where(
        is_zero, np.float32(0), largest / 127
    )
