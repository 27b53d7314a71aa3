"""What a pruned set would save, from a recorded routing alone.

The set keeps the experts of each layer that the first half of the tokens picked most. All of it is
replayed with the set, and the second half is counted: its pools are warm. A recording does not know
what a router would have taken in the place of a pick that goes, so that there are two answers: that
of others drawn anew, which hit too seldom, and that of nobody in its place, which reads too little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UsageError
from ..runtime.replay import Demand, Outcome, replay
from ..runtime.trace import DECODE, NO_EXPERT, Trace
from .prune_replay import redirect


@dataclass(frozen=True, slots=True)
class HalfMask:
    """A set from one half of a trace, on the other half. An outcome for each capacity."""

    keep: float
    num_chosen_on: int  # tokens
    num_tested_on: int
    num_kept: tuple[int, ...]  # experts, by layer
    removed_picks: float  # share of the picks of the second half
    full: tuple[Outcome, ...]
    drawn_anew: tuple[Outcome, ...]
    left_out: tuple[Outcome, ...]


def half_mask(trace: Trace, keep: float, policy: str, capacities: Sequence[int]) -> HalfMask:
    """`keep`: share of the experts of every layer. Decoded tokens only, as far as there are any.

    Raises UsageError where there are too few of them, or fewer experts than a token needs.
    """
    is_decoded = trace.phase == DECODE
    routes = trace.experts[is_decoded] if is_decoded.any() else trace.experts
    half = len(routes) // 2
    if not half:
        raise UsageError("this trace is too short", "its tokens have to be halved")
    counts = {
        place: np.bincount(_picks(routes[:half, place]), minlength=num_experts).astype(np.float64)
        for place, num_experts in enumerate(trace.num_experts.tolist())
    }
    kept = {place: _most(values, keep, routes.shape[2]) for place, values in counts.items()}
    is_lost = _lost(routes, kept)
    anew = redirect(routes, kept, {place: values + 0.5 for place, values in counts.items()})
    left_out = np.where(is_lost, NO_EXPERT, routes)
    return HalfMask(
        keep,
        half,
        len(routes) - half,
        tuple(map(len, kept.values())),
        float(is_lost[half:].sum() / max(1, (routes[half:] != NO_EXPERT).sum())),
        *(_second(trace, each, half, policy, capacities) for each in (routes, anew, left_out)),
    )


def _second(
    trace: Trace, routes: NDArray[np.integer], half: int, policy: str, capacities: Sequence[int]
) -> tuple[Outcome, ...]:
    """Demand of all but the first `half` steps, in pools that those have filled."""
    whole, first = (
        replay(Demand(_decoded(trace, each)), policy, capacities)
        for each in (routes, routes[:half])
    )
    return tuple(
        replace(
            every,
            hits=every.hits - begin.hits,
            misses=every.misses - begin.misses,
            bytes_read=every.bytes_read - begin.bytes_read,
            num_steps=every.num_steps - begin.num_steps,
        )
        for every, begin in zip(whole, first, strict=True)
    )


def _picks(column: NDArray[np.integer]) -> NDArray[np.integer]:
    return column[column != NO_EXPERT]


def _most(counts: NDArray[np.float64], keep: float, top_k: int) -> tuple[int, ...]:
    """The experts that were picked most, ascending; ties go to the lower id."""
    number = round(keep * len(counts))
    if number < top_k:
        raise UsageError(
            f"{number} of {len(counts)} experts cannot stay", f"every token needs {top_k}"
        )
    return tuple(sorted(np.argsort(-counts, kind="stable")[:number].tolist()))


def _lost(routes: NDArray[np.integer], kept: dict[int, tuple[int, ...]]) -> NDArray[np.bool_]:
    lost = np.zeros(routes.shape, dtype=np.bool_)
    for place, ids in kept.items():
        lost[:, place] = np.isin(routes[:, place], (NO_EXPERT, *ids), invert=True)
    return lost


def _decoded(trace: Trace, routes: NDArray[np.integer]) -> Trace:
    """These routes as decoded tokens of the trace's model."""
    phase = np.full(len(routes), DECODE, dtype=np.int8)
    return replace(trace, experts=routes.astype(np.int32), weights=None, phase=phase)
