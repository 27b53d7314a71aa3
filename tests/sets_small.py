"""Pruned sets for the tiny stores of tests, without calibration."""

from pathlib import Path

from edgemoe.active_set import owner_of
from edgemoe.models import store_args
from edgemoe.runtime.index import load_index
from edgemoe.runtime.sets import ExpertSet, SetOwner, save_set


def owner(path: Path) -> SetOwner:
    index = load_index(path)
    return owner_of(index, store_args(index))


def make_set(path: Path, name: str, kept: dict[int, tuple[int, ...]], **changes) -> ExpertSet:
    """Save a set that keeps these experts by layer."""
    of = owner(path)
    values = {
        "fingerprint": of.fingerprint,
        "tokenizer_sha256": of.tokenizer_sha256,
        "num_experts": of.num_experts,
        "method": "by hand",
    }
    expert_set = ExpertSet(name, kept, **(values | changes))
    save_set(path, expert_set)
    return expert_set
