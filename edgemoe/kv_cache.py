"""The KV cache of one session: keys and values of every layer, allocated once. Floor 2."""

import torch
from torch import Tensor

from .models.args import ModelArgs
from .runtime.errors import UsageError

_DTYPES = {32: torch.float32, 16: torch.bfloat16}


class KVCache:
    """Room for `capacity` tokens; `offset` tokens are stored.

    A step appends its keys and values layer by layer at `offset` and then advances once, so a step
    that fails in the middle leaves the cache as it was.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, kv_bits: int = 16
    ) -> None:
        if kv_bits not in _DTYPES:
            raise UsageError(f"`kv_bits` must be 16 or 32, got {kv_bits}")
        if capacity < 1:
            raise UsageError(
                f"a context of {capacity} tokens cannot be meant", "expected 1 or more"
            )
        self.capacity, self.kv_bits = capacity, kv_bits
        self.offset = 0
        # Not zeroed: pages are first touched by the tokens that need them.
        self._data = torch.empty(
            (num_layers, 2, num_kv_heads, capacity, head_dim), dtype=_DTYPES[kv_bits]
        )

    @classmethod
    def for_model(cls, args: ModelArgs, capacity: int, kv_bits: int = 16) -> "KVCache":
        """A cache of the shape that a model (`ModelArgs`) needs."""
        return cls(args.num_layers, args.num_kv_heads, args.head_dim, capacity, kv_bits)

    @staticmethod
    def bytes_for(
        num_layers: int, num_kv_heads: int, head_dim: int, capacity: int, kv_bits: int = 16
    ) -> int:
        """What a cache of this shape takes, without making it."""
        return num_layers * 2 * num_kv_heads * capacity * head_dim * kv_bits // 8

    @property
    def num_bytes(self) -> int:
        return self._data.numel() * self._data.element_size()

    def check_room(self, num_tokens: int) -> None:
        """Raise UsageError where `num_tokens` more do not fit."""
        if self.offset + num_tokens > self.capacity:
            raise UsageError(
                f"{num_tokens} more tokens do not fit into the context",
                f"{self.offset} of the {self.capacity} tokens of the context length are used",
                "raise the context length (--context), shorten the prompt, or start a new session",
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store `[T, KV, hd]` of a layer from `offset` on; returns its `[KV, capacity, hd]`s."""
        num_tokens = keys.shape[0]
        self.check_room(num_tokens)
        end = self.offset + num_tokens
        stored_keys, stored_values = self._data[layer, 0], self._data[layer, 1]
        stored_keys[:, self.offset : end].copy_(keys.transpose(0, 1))
        stored_values[:, self.offset : end].copy_(values.transpose(0, 1))
        return stored_keys, stored_values

    def advance(self, num_tokens: int) -> None:
        """Make the tokens that every layer has appended part of the context."""
        self.check_room(num_tokens)
        self.offset += num_tokens

    def trim(self, length: int) -> None:
        """Forget every token from `length` on."""
        if not 0 <= length <= self.offset:
            raise UsageError(f"cannot trim the context to {length} tokens", f"it has {self.offset}")
        self.offset = length
