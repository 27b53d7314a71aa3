"""Rotary position embedding: frequencies and angles. NumPy in float64, rounded to float32 once.

The types that depend on the length (dynamic, longrope) follow the capacity of the KV cache, not the
tokens seen so far: frequencies that moved while a text grows would contradict the keys already
stored, and a prompt would give other bits in two pieces than in one.
"""

import math

import numpy as np

from .args import RopeArgs


def frequencies(rope: RopeArgs, capacity: int) -> np.ndarray:
    """Radians per position, float64 `[rotary_dim / 2]`, for a context of `capacity` tokens."""
    dim, theta = rope.rotary_dim, rope.theta
    if rope.kind == "dynamic":
        growth = rope.factor * max(capacity, rope.original_context) / rope.original_context
        theta *= (growth - (rope.factor - 1)) ** (dim / (dim - 2))
    plain = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    if rope.kind == "longrope":
        is_long = capacity > rope.original_context
        return plain / np.array(rope.long_factor if is_long else rope.short_factor)
    return plain


def _llama3(plain: np.ndarray, rope: RopeArgs) -> np.ndarray:
    """Long wavelengths are slowed by the factor, short ones kept, those between are blended."""
    turns = rope.original_context * plain / (2 * math.pi)  # in the trained length
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return plain * (keep + (1.0 - keep) / rope.factor)


def _yarn(plain: np.ndarray, rope: RopeArgs) -> np.ndarray:
    """As llama3, blended linearly over the index between two numbers of turns."""

    def index_of(turns: float) -> float:
        length = rope.original_context / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    slowed = np.clip((np.arange(len(plain)) - low) / (high - low), 0.0, 1.0)
    return plain * (1.0 - slowed) + plain / rope.factor * slowed


class Rotary:
    """Rotates the first `rotary_dim` of every head by its position."""

    def __init__(self, rope: RopeArgs) -> None:
        self._rope = rope
        self._frequencies: dict[int, np.ndarray] = {}  # by capacity

    def angles(
        self, position: int, num_tokens: int, capacity: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine `[T, 1, rotary_dim / 2]` of the tokens from `position` on."""
        if capacity not in self._frequencies:
            self._frequencies[capacity] = frequencies(self._rope, capacity)
        positions = np.arange(position, position + num_tokens, dtype=np.float64)
        angle = positions[:, None, None] * self._frequencies[capacity]
        factor = self._rope.attention_factor
        cos, sin = np.cos(angle) * factor, np.sin(angle) * factor
        return cos.astype(np.float32), sin.astype(np.float32)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x `[T, H, hd]`; pairs are (i, i + rotary_dim / 2), the rest of the head passes through."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)
