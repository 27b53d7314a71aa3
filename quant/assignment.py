"""Linear assignment: a column for every row, so that the sum of the scores is largest.

Shortest augmenting paths with prices (Jonker and Volgenant, 1987): O(n^3), and each step of a path
is one pass over a row. Rows whose best columns differ are assigned at once, so that two experts of
which one is the other with its neurons in another order cost one pass over the matrix.
"""

import numpy as np
from numpy.typing import NDArray


def best_assignment(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """scores `[n, n]`, finite -> the column of every row `[n]`, a permutation; ties go to the
    column that comes first."""
    cost = scores.max(initial=0.0) - np.asarray(scores, dtype=np.float64)
    column_price = cost.min(axis=0)
    reduced = cost - column_price
    best = reduced.argmin(axis=1)
    row_price = reduced[np.arange(len(cost)), best]
    del reduced
    column_of = np.full(len(cost), -1)
    row_of = np.full(len(cost), -1)
    for row, column in enumerate(best.tolist()):
        if row_of[column] < 0:
            column_of[row], row_of[column] = column, row
    for row in np.flatnonzero(column_of < 0).tolist():
        _augment(row, cost, row_price, column_price, column_of, row_of)
    return column_of


def _augment(
    first: int,
    cost: NDArray[np.float64],
    row_price: NDArray[np.float64],
    column_price: NDArray[np.float64],
    column_of: NDArray[np.int64],
    row_of: NDArray[np.int64],
) -> None:
    """Assign row `first`: along the cheapest path from it to a free column every row changes its
    column. Prices follow, so that no pair costs less than its prices and assigned ones just that.
    """
    size = len(cost)
    shortest = np.full(size, np.inf)
    open_ = np.full(size, np.inf)  # `shortest` of the columns that are not settled
    is_settled = np.zeros(size, dtype=np.bool_)
    before = np.full(size, first)
    rows, row, length = [], first, 0.0
    while True:
        rows.append(row)
        reach = cost[row] - column_price
        reach += length - row_price[row]
        better = reach < open_
        better &= ~is_settled
        np.copyto(open_, reach, where=better)
        np.copyto(before, row, where=better)
        column = int(open_.argmin())
        length = float(open_[column])
        shortest[column], open_[column], is_settled[column] = length, np.inf, True
        row = int(row_of[column])
        if row < 0:
            break
    row_price[first] += length
    others = np.array(rows[1:], dtype=np.int64)
    row_price[others] += length - shortest[column_of[others]]
    column_price[is_settled] -= length - shortest[is_settled]
    while True:
        row = int(before[column])
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == first:
            return
