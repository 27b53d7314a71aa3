"""Parts of a profile, read without the rest of it: what an engine keeps in memory. Floor 0."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .profile import Profile, check_metadata, damaged
from .profile_sums import STATES, LayerSums
from .transitions import StateCounts

TABLE_BYTES = 32 << 20  # of all tables by token id and by path
_ENTRY_BYTES = 28  # in memory: a row of its own and one count


def read_popularity(
    path: str | Path, num_experts: Mapping[int, int], top_k: int
) -> dict[int, NDArray[np.float64]]:
    """Share of tokens that choose each expert, [E] by layer: the counts only, not a whole profile.
    Raises FormatError, UsageError for another model."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            head = json.loads((file.metadata() or {})["profile"])
            names = {layer: f"layers.{layer}.hard_count" for layer in num_experts}
            known = set(file.keys())
            layers = {
                layer: LayerSums(file.get_tensor(name))
                for layer, name in names.items()
                if name in known
            }
        profile = Profile(layers, int(head["top_k"]), int(head["num_tokens"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, error) from error
    profile.validate(str(path))
    profile.check_model(num_experts, top_k)
    return {layer: profile.popularity(place) for place, layer in enumerate(layers)}


def read_tables(path: str | Path, max_bytes: int = TABLE_BYTES) -> Profile:
    """What predictions need of a profile: counts, pairs, and of the tables by token id and by path
    the states seen most, so many that all of them take `max_bytes` in a `Prefetcher`. One layer is
    read at a time. Raises FormatError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata, known = check_metadata(file.metadata(), path), set(file.keys())
            head = json.loads(metadata["profile"])
            numbers = sorted(int(name.split(".")[1]) for name in known if "hard_count" in name)
            most = max_bytes // (_ENTRY_BYTES * len(STATES) * max(1, len(numbers)))
            layers = {}
            for layer in numbers:
                sums = LayerSums(file.get_tensor(f"layers.{layer}.hard_count"))
                if f"layers.{layer}.next_count" in known:
                    sums.next_count = file.get_tensor(f"layers.{layer}.next_count")
                for each, names in STATES.items():
                    if f"layers.{layer}.{names[0]}" in known:
                        parts = (file.get_tensor(f"layers.{layer}.{name}") for name in names)
                        counts = StateCounts.empty(len(numbers))
                        counts.key, counts.expert, counts.count = parts
                        setattr(sums, each, counts.most_seen(most))
                layers[layer] = sums
        profile = Profile(layers, int(head["top_k"]), int(head["num_tokens"]))
    except FormatError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise damaged(path, error) from error
    profile.validate(str(path))
    return profile
