"""Checks of what stands in for a router or a predictor: recorded routes, given guesses. Floor 2."""

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UsageError
from ..runtime.records import RecordTable
from .args import ModelArgs


def check_routes(
    ids: NDArray[np.integer], weights: NDArray[np.floating], args: ModelArgs, table: RecordTable
) -> None:
    """Raises UsageError unless they are one token's routes [layers with experts, 1 to K], of
    distinct experts that each layer has, ascending, then -1."""
    places, top_k = len(args.moe_layers), args.top_k
    is_good = ids.ndim == 2 and ids.shape == weights.shape and len(ids) == places
    if not is_good or not 1 <= ids.shape[1] <= top_k:
        raise UsageError(
            f"forced routes of shape {ids.shape} do not go with this model",
            f"expected [{places}, 1 to {top_k}] ids and as many weights",
        )
    limits = np.array([table.num_experts[layer] for layer in args.moe_layers])
    is_known = (ids >= -1).all() and (ids.max(axis=1) < limits).all()
    is_next = (np.diff(ids, axis=1) > 0) & (ids[:, :-1] >= 0)
    is_in_order = is_next | (ids[:, 1:] == -1)
    if not is_known or not is_in_order.all():
        raise UsageError(
            "forced routes must name different experts of each layer, in ascending order, then -1"
        )


def check_guesses(guesses: NDArray[np.integer], args: ModelArgs) -> NDArray[np.int32]:
    """One token's guesses [layers with experts, any], as the core takes them; UsageError else."""
    given = np.array(guesses, dtype=np.int32)
    if given.ndim != 2 or len(given) != len(args.moe_layers):
        raise UsageError(
            f"guesses of shape {given.shape} do not go with this model",
            f"expected [{len(args.moe_layers)}, any]",
        )
    return given
