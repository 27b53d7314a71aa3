"""Cuts the experts that a chunk of tokens wants into runs that the expert cache holds. Floor 0."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Wave(NamedTuple):
    """Experts `begin` .. `end` - 1 of the sorted list of one layer."""

    begin: int
    end: int
    keys: list[int]
    counts: np.ndarray | None  # tokens of each expert; None: one


def cut_waves(
    keys: list[int],
    begins: np.ndarray | None,
    num_bytes_of: Sequence[int],
    capacity_bytes: int,
    max_pairs: int,
) -> list[Wave]:
    """One wave where all fit, else halves of the capacity, so that one wave can be read while
    another is computed.

    `begins` [n + 1]: where the pairs of each expert begin; None: one token, one pair each.
    `max_pairs`: the most pairs in one wave, unless one expert alone has more.
    """
    total = sum(num_bytes_of[key] for key in keys)
    counts = None if begins is None else begins[1:] - begins[:-1]
    num_pairs = len(keys) if begins is None else int(begins[-1])
    if total <= capacity_bytes and num_pairs <= max_pairs:
        return [Wave(0, len(keys), keys, counts)]
    starts, num_bytes, num_pairs = [0], 0, 0
    for i, key in enumerate(keys):
        pairs = 1 if counts is None else int(counts[i])
        is_full = num_bytes + num_bytes_of[key] > capacity_bytes // 2
        if i > starts[-1] and (is_full or num_pairs + pairs > max_pairs):
            starts.append(i)
            num_bytes, num_pairs = 0, 0
        num_bytes += num_bytes_of[key]
        num_pairs += pairs
    return [
        Wave(begin, end, keys[begin:end], None if counts is None else counts[begin:end])
        for begin, end in zip(starts, [*starts[1:], len(keys)], strict=True)
    ]
