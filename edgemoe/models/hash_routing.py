"""Hash-routed layers: a table gives the experts of a token by its id. Floor 2.

Hash Layers (2106.04426) choose by the token alone. As DeepSeek-V4 has them, in its first layers
(`gate.tid2eid`), the router still weighs: its scores of the chosen rows are their routing weights,
by the rule of the other layers. So the demand of such a layer is known as soon as the token is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import UsageError


def table_fault(table: NDArray[np.integer], num_experts: int) -> str | None:
    """What is wrong with rows [n, K] of a table, None: each names K different experts."""
    if table.dtype not in (np.int64, np.int32):
        return f"it is stored as {table.dtype}, expected whole numbers of 32 or 64 bits"
    ordered = np.sort(table, axis=1)
    is_known = (ordered[:, 0] >= 0) & (ordered[:, -1] < num_experts)
    is_good = is_known & (np.diff(ordered, axis=1) > 0).all(axis=1)
    if is_good.all():
        return None
    row = int(np.argmin(is_good))
    return f"token {row} goes to {table[row].tolist()}, expected different ones of 0 to " + str(
        num_experts - 1
    )


def check_whole(layer: int, is_in: NDArray[np.bool_]) -> None:
    """UsageError where a hash-routed layer would lose an expert [E]: its table sends tokens to it
    all the same."""
    if not is_in.all():
        raise UsageError(
            f"layer {layer} is hash-routed: a table sends tokens to all of its experts",
            f"expert {int(np.argmin(is_in))} would be out",
            "leave this layer whole",
        )


def demand_of(
    table: NDArray[np.int32], ids: Sequence[int] | NDArray[np.integer], bodies: Sequence[int] | None
) -> NDArray[np.int64]:
    """The experts that tokens ids [T] go through, each once, ascending; `bodies` [E]: the expert of
    every row of the router, -1: none; None: row e is expert e."""
    rows = np.unique(table[np.unique(ids)])
    found = rows if bodies is None else np.unique(np.asarray(bodies)[rows])
    return found[found >= 0].astype(np.int64)
