"""From a router's scores to the routes of a token: the twin of csrc/routing.cpp. Floor 2.

The order: softmax over the rows that masks and gains leave; the largest `active_experts` of them,
of equal ones the lowest; of those the shortest run that adds up to more than `top_p`; weights,
divided where the model does; gains; rows of one body summed up, null experts dropped.
"""

import numpy as np

from .rules import Rule

NO_BODY = -1


def choose(
    rule: Rule,
    scores: np.ndarray,
    rows: np.ndarray,
    top_k: int,
    renormalise: bool,
    bodies: np.ndarray | None = None,
    gains: np.ndarray | None = None,
    given: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """scores `[T, n]`, a softmax over the router's rows `rows` int64 `[n]`, ascending -> routes:
    bodies int64 `[T, K]`, ascending, then -1, and routing weights fp32 `[T, K]`, then 0.

    `bodies` int64 `[E]`: what each row stands for, -1: nothing (a null expert). `gains` fp32 `[E]`.
    `given` `[T, K]`: positions to choose among, ascending, None: all.
    """
    count = min(rule.active_experts or top_k, scores.shape[1])
    order = _ranked(scores, given)[:, :count]
    weights, chosen = np.take_along_axis(scores, order, axis=-1), rows[order]
    found = chosen if bodies is None else bodies[chosen]
    is_used = found >= 0
    before = weights.cumsum(axis=-1, dtype=np.float64)
    if renormalise:  # over what has a body; top-p spreads nothing over those that stay
        weights = weights / np.where(is_used, weights, 0.0).sum(axis=-1, keepdims=True)
    if 0 < rule.top_p < 1:
        is_used[:, 1:] &= before[:, :-1] <= float(np.float32(rule.top_p))
    if gains is not None:
        weights = weights * gains[chosen]
    order = chosen.argsort(axis=-1)  # weights of one body are added in the order of rows
    weights, found, is_used = (
        np.take_along_axis(part, order, axis=-1) for part in (weights, found, is_used)
    )
    num_bodies = int(rows[-1]) + 1 if bodies is None else int(bodies.max()) + 1
    found = np.where(is_used, found, num_bodies)  # one column more, for what is not used
    token = np.arange(len(scores))[:, None]
    sums = np.zeros((len(scores), num_bodies + 1), dtype=np.float32)
    np.add.at(sums, (token, found), weights)
    is_active = np.zeros(sums.shape, dtype=np.bool_)
    is_active[token, found] = True
    is_active[:, num_bodies] = False
    places = np.sort(np.where(is_active, np.arange(num_bodies + 1), num_bodies), axis=-1)
    ids = np.full((len(scores), top_k), num_bodies)
    ids[:, : places.shape[1]] = places[:, :top_k]
    weights = np.take_along_axis(sums, ids, axis=-1)
    is_none = ids == num_bodies
    return np.where(is_none, NO_BODY, ids), np.where(is_none, np.float32(0), weights)


def _ranked(scores: np.ndarray, given: np.ndarray | None) -> np.ndarray:
    """Positions `[T, n]`, or those given `[T, K]`, the largest scores first."""
    if given is None:
        return (-scores).argsort(axis=-1, kind="stable")
    order = (-np.take_along_axis(scores, given, axis=-1)).argsort(axis=-1, kind="stable")
    return np.take_along_axis(given, order, axis=-1)


def input_scale(
    rule: Rule,
    scores: np.ndarray,
    rows: np.ndarray,
    top_k: int,
    theta: np.ndarray,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """What the input of a token's experts is multiplied with, `[T, D]`: 1 + sum of a (theta - 1)
    over its auxiliary ones, a being the share of each among them; thetas of 1 change no bit.
    scores, rows, given as in `choose`; theta fp32 `[E, D]`."""
    active = rule.active_experts or top_k
    order = _ranked(scores, given)
    order = order[:, active : active + rule.num_auxiliary]
    shares = np.take_along_axis(scores, order, axis=-1)
    shares = shares / shares.sum(axis=-1, keepdims=True)
    return 1.0 + (shares[:, :, None] * (theta[rows[order]] - 1.0)).sum(axis=1)
